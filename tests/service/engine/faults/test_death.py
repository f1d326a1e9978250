"""Faults and stops that end an engine: everybody is told, and its status says why."""

import asyncio
import threading
import time

import pytest
import torch

from service.engine import loop
from service.engine.events import FaultKind
from service.engine.outbox import Outbox
from service.engine.scheduler import Scheduler
from service.engine.sequence import Update
from service.engine.watchdog import Watchdog
from service.errors import GenerationError, UnavailableError
from tests.service.engine.driving import prompt_of, request, run, running_engine, wait_until
from tests.service.engine.faults.injection import Panic, boom, together
from tests.service.engine.stepping import sequence_of


def test_steps_that_fail_in_a_row_end_the_engine(running, monkeypatch):
    monkeypatch.setattr("service.engine.loop.MAX_FAILED_STEPS", 3)
    with running() as one:
        original = one.runner.run
        monkeypatch.setattr(one.runner, "run", boom)
        for _ in range(2):
            with pytest.raises(GenerationError):
                run(one, request(prompt_of(5)))
        monkeypatch.setattr(one.runner, "run", original)
        run(one, request(prompt_of(5)))  # begins a new row
        monkeypatch.setattr(one.runner, "run", boom)
        for _ in range(2):
            with pytest.raises(GenerationError):
                run(one, request(prompt_of(5)))
            assert one.status().is_alive
        with pytest.raises(GenerationError):
            run(one, request(prompt_of(5)))
        wait_until(lambda: not one.status().is_alive)
        assert one.status().reason == "the engine cannot go on: 3 steps in a row failed"
        with pytest.raises(UnavailableError, match="3 steps in a row"):
            run(one, request(prompt_of(5)))
        wait_until(lambda: one.status().num_pages_used == 0)


def test_a_device_that_answers_no_more_ends_the_engine_and_everybody_is_told(running, monkeypatch):
    with running(max_running_requests=1) as one:
        monkeypatch.setattr(one.runner, "_forward", boom)
        monkeypatch.setattr(one.runner, "statistics", boom)
        monkeypatch.setattr(type(one.runner), "answers", property(lambda _: False))
        failed, waiting = together(one, request(prompt_of(5)), request(prompt_of(5)))
        assert isinstance(failed, GenerationError)
        assert isinstance(waiting, UnavailableError)
        assert "the device answers no more" in str(waiting)
        wait_until(lambda: not one.is_busy)
        assert not one.status().is_alive
        assert one.events.abort_reasons == ["death"]
        assert one.status().num_pages_used == 0


def test_a_thread_that_ends_by_whatever_raises_tells_everybody(tiny_model_dir, monkeypatch):
    with running_engine(tiny_model_dir, run_ahead=False) as one:

        def panic():
            raise Panic("a secret")

        monkeypatch.setattr(one.core, "step", panic)
        with pytest.raises(UnavailableError, match="cannot go on"):
            run(one, request(prompt_of(5)))
        wait_until(lambda: not one.is_busy)
        assert "secret" not in one.status().reason
        assert one.status().num_pages_used == 0


def test_a_step_that_hangs_is_given_up_and_its_pages_are_free_if_it_ever_returns(
    running, monkeypatch
):
    with running() as one:
        is_inside, goes_on = threading.Event(), threading.Event()
        original = one.runner.run

        def hang(chunks):
            is_inside.set()
            goes_on.wait(20)
            return original(chunks)

        monkeypatch.setattr(one.runner, "run", hang)

        async def ask():
            async with await one.submit(request(prompt_of(5))) as generation:
                await asyncio.to_thread(is_inside.wait, 20)
                monkeypatch.setattr(one, "_watchdog", Watchdog(0.4))
                await asyncio.to_thread(
                    wait_until, lambda: one.watch() or not one.status().is_alive
                )
                async for _ in generation:
                    pass

        with pytest.raises(UnavailableError, match="no progress"):
            asyncio.run(ask())
        assert one.is_busy, "the thread still hangs"
        assert not one.status().is_alive
        with pytest.raises(UnavailableError, match="no progress"):
            run(one, request(prompt_of(5)))
        goes_on.set()
        wait_until(lambda: not one.is_busy)
        assert one.status().num_pages_used == 0
        assert one.events.kinds == [FaultKind.HANG]


def test_an_idle_engine_shows_that_it_is_alive_before_it_would_look_stuck(running, monkeypatch):
    monkeypatch.setattr(loop, "_BEAT_S", 60)
    with running(stall_timeout_s=0.4) as one:
        before = one._loop.heartbeat
        wait_until(lambda: one._loop.heartbeat > before)


def test_loading_is_not_counted_as_standing_still(engine):
    idle = loop.EngineLoop(engine.core, 30)
    idle.heartbeat = -1e6
    idle._stopping.set()
    idle.start()
    assert idle.heartbeat > 0


def test_the_status_of_an_engine_that_dies_meanwhile_is_of_one_moment(engine, monkeypatch):
    seen = iter([True, False, False])
    monkeypatch.setattr(loop.EngineLoop, "is_alive", property(lambda _: next(seen)))
    status = engine.status()
    assert (status.is_alive, status.reason) == (True, "")


def test_never_fewer_than_none_run(engine, monkeypatch):
    """Probes ask while the engine takes sequences in."""
    monkeypatch.setattr(Scheduler, "num_unstarted", property(lambda _: 9))
    assert engine.status().num_running == 0


def test_who_is_taken_in_is_counted_all_the_time(engine, monkeypatch):
    counted, add = [], engine.core.add

    def add_and_look(sequence):
        counted.append(engine._loop.num_waiting_tokens)
        add(sequence)
        counted.append(engine._loop.num_waiting_tokens)

    monkeypatch.setattr(engine.core, "add", add_and_look)
    run(engine, request(prompt_of(40)))
    assert min(counted) >= 40


def test_only_the_engine_thread_ends_what_nobody_can_be_told_of(engine, monkeypatch):
    threads, abort = [], engine.core.abort

    def record(sequence, reason):
        threads.append(threading.current_thread().name)
        abort(sequence, reason)

    monkeypatch.setattr(engine.core, "abort", record)
    closed = asyncio.new_event_loop()
    sequence = sequence_of(prompt_of(40), max_tokens=900)
    address = loop.Address(closed, Outbox(), 0)
    closed.close()
    engine._loop._addresses[sequence] = address
    engine._loop._deliver({sequence: Update("x")})
    wait_until(lambda: bool(threads))
    assert threads == ["engine"]
    assert sequence not in engine._loop._addresses


def test_the_status_tells_of_a_stalled_and_of_a_dead_engine(running, monkeypatch):
    with running(stall_timeout_s=0.05) as one:

        def hang():
            time.sleep(0.5)
            return {}

        monkeypatch.setattr(one.core, "step", hang)
        monkeypatch.setattr(type(one.core), "has_work", property(lambda _: True))
        wait_until(lambda: "no progress" in one.status().reason)
        monkeypatch.undo()
        one.stop()
        assert not one.status().is_alive
        assert one.status().reason


def test_stopping_the_engine_ends_running_generations_with_an_error(running):
    with running() as one:

        async def stop_meanwhile():
            async with await one.submit(request(prompt_of(5), max_tokens=2000)) as generation:
                async for _ in generation:
                    await asyncio.to_thread(one.stop)

        with pytest.raises(UnavailableError, match="stopped"):
            asyncio.run(stop_meanwhile())
        assert one.events.abort_reasons == ["shutdown"]


@pytest.mark.parametrize("runner_answers", [True, False])
def test_asking_the_device_finds_out_whether_it_answers(engine, monkeypatch, runner_answers):
    if not runner_answers:
        monkeypatch.setattr(torch, "ones", boom)
    assert engine.runner.answers is runner_answers


def test_a_device_without_memory_answers(engine, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(torch, "ones", full)
    assert engine.runner.answers
