"""A step that fails, wherever it does: who is told, and that the engine goes on."""

import asyncio

import pytest

from service.engine.events import FaultKind
from service.errors import GenerationError
from tests.service.engine.driving import collect, prompt_of, request, run, wait_until
from tests.service.engine.faults.injection import boom, same, together


def test_a_failing_step_fails_its_requests_only_and_the_engine_lives_on(engine, monkeypatch):
    original = engine.runner.run

    def fail_once(chunks):
        monkeypatch.setattr(engine.runner, "run", original)
        raise RuntimeError("out of luck")

    monkeypatch.setattr(engine.runner, "run", fail_once)
    with pytest.raises(GenerationError):
        run(engine, request(prompt_of(20)))
    assert engine.events.kinds == [FaultKind.STEP]
    assert len(run(engine, request(prompt_of(20)))[0][0][0]) == 8
    wait_until(lambda: engine.status().num_pages_used == 0)


def test_a_request_that_ended_in_a_failing_step_gets_its_answer(engine, monkeypatch):
    original = engine.core._text_output

    def brittle(sequence):
        output = original(sequence)
        if sequence.prompt_ids[0] == 99:
            output.push = boom
        return output

    monkeypatch.setattr(engine.core, "_text_output", brittle)

    async def both():
        return await asyncio.gather(
            collect(engine, request([98, 5, 6], max_tokens=1)),
            collect(engine, request([99, 5, 6], max_tokens=5)),
            return_exceptions=True,
        )

    fine, failed = asyncio.run(both())
    assert len(fine[0][0]) == 1
    assert isinstance(failed, GenerationError)
    wait_until(lambda: engine.status().num_pages_used == 0)
    assert engine._loop.num_unfinished == 0


def test_a_request_the_engine_cannot_take_in_fails_alone(engine, monkeypatch):
    monkeypatch.setattr(engine.core, "_text_output", boom)
    with pytest.raises(GenerationError):
        run(engine, request(prompt_of(5)))
    monkeypatch.undo()
    assert len(run(engine, request(prompt_of(5)))[0][0][0]) == 8


def test_a_failing_scheduler_fails_everybody_and_not_the_previous_step(engine, monkeypatch):
    monkeypatch.setattr(engine.core._scheduler, "schedule", boom)

    async def both():
        one = request(prompt_of(5))
        return await asyncio.gather(
            collect(engine, one), collect(engine, one), return_exceptions=True
        )

    results = asyncio.run(both())
    assert all(isinstance(result, GenerationError) for result in results)
    monkeypatch.undo()
    assert len(run(engine, request(prompt_of(5)))[0][0][0]) == 8


def test_a_broken_device_still_lets_every_client_know(running, monkeypatch):
    with running() as one:
        monkeypatch.setattr(one.runner, "run", boom)
        monkeypatch.setattr(one.runner, "statistics", boom)
        with pytest.raises(GenerationError):
            run(one, request(prompt_of(5)))
        assert one.status().is_alive
        assert one.status().num_pages_used == 0


def test_a_sampler_that_raises_fails_those_who_get_a_token(engine, monkeypatch):
    prefilling = request(prompt_of(3000), max_tokens=4)  # takes more than one step
    [expected] = run(engine, prefilling)
    original = engine.core._sampler.sample

    def sample(logits, sequences):
        if any(len(sequence.prompt_ids) == 20 for sequence in sequences):
            raise RuntimeError("out of luck")
        return original(logits, sequences)

    monkeypatch.setattr(engine.core._sampler, "sample", sample)
    failed, fine = together(engine, request(prompt_of(20)), prefilling)
    assert isinstance(failed, GenerationError)
    same(fine, expected)
    assert engine.events.kinds == [FaultKind.STEP]
