"""Faults in the middle of something else: reports on prompts, reused pages, steps in flight."""

from typing import Any

import pytest
import torch

from service.engine import prompt_logprobs
from service.engine.core import EngineCore
from service.engine.engine import Engine
from service.engine.events import FaultKind
from service.engine.sequence import Sequence, Update
from service.errors import ServiceError, UnavailableError
from tests.service.engine.stepping import BLOCK, engine_of, sequence_of, tokens_of


@pytest.fixture(params=[False, True], ids=["waits", "runs-ahead"])
def engine(request, tiny_model_dir):
    one: Any = engine_of(tiny_model_dir, num_pages=100, run_ahead=request.param)
    one.events.kinds = []
    one.events.engine_error = one.events.kinds.append
    return one


def step(core: EngineCore) -> dict[Sequence, Update]:
    """A step as the engine's loop takes it."""
    try:
        return core.step()
    except Exception as error:  # noqa: BLE001 - as the loop does
        return core.fail_step(error)


def play(engine: Engine, *sequences: Sequence) -> list[Update]:
    core = engine.core
    got = dict.fromkeys(sequences, Update())
    for one in sequences:
        core.add(one)
    while core.has_work:
        for one, update in step(core).items():
            got[one] += update
    assert core.num_pages_used == core.num_running == core.num_waiting == 0
    return list(got.values())


def alone(engine: Engine, *args, **kwargs) -> Update:
    one = sequence_of(*args, **kwargs)
    one.prefix = None
    [update] = play(engine, one)
    return update


def assert_same(given: Update, expected: Update) -> None:
    assert given.finish is not None, given.error
    assert expected.finish is not None
    assert given.token_ids == expected.token_ids
    assert given.finish.statistics == expected.finish.statistics
    assert [one.token_id for one in given.prompt_logprobs] == [
        one.token_id for one in expected.prompt_logprobs
    ]
    values, others = (
        torch.tensor([one.logprob for one in update.prompt_logprobs])
        for update in (given, expected)
    )
    assert torch.allclose(values, others, atol=1e-3)


def fail_once(monkeypatch, target, name, error, when=lambda *_: True):
    """Let one call raise, the first for which ``when`` holds."""
    original, failed = getattr(target, name), []

    def broken(*args, **kwargs):
        if not failed and when(*args):
            failed.append(name)
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(target, name, broken)
    return failed


@pytest.mark.parametrize("num_before", [0, 3])
def test_a_report_on_a_prompt_that_fails_concerns_its_request_only(engine, monkeypatch, num_before):
    """The step has counted already: computed again, it would count twice for everybody."""
    jobs = [(tokens_of(1, 40), "dense@v1"), (tokens_of(2, 70), "snapkv@v1")]
    expected = [alone(engine, *job, max_tokens=12) for job in jobs]
    sequences = [sequence_of(*job, max_tokens=12) for job in jobs]
    reported = sequence_of(tokens_of(3, 300), prompt_logprobs=2)
    full = torch.OutOfMemoryError("full")
    failed = fail_once(monkeypatch, prompt_logprobs, "_most_likely", full)
    got = dict.fromkeys([*sequences, reported], Update())
    for one in sequences:
        engine.core.add(one)
    for number in range(30):
        if number == num_before:
            engine.core.add(reported)
        for one, update in step(engine.core).items():
            got[one] += update
    assert failed
    assert engine.events.kinds == [FaultKind.MEMORY]
    assert isinstance(got.pop(reported).error, UnavailableError)
    for given, wanted in zip(got.values(), expected, strict=True):
        assert_same(given, wanted)
    assert engine.core.num_pages_used == 0
    assert engine.events.num_preempted == 0


def test_a_report_whose_step_chooses_no_tokens_after_all_is_computed_again(engine, monkeypatch):
    prompt, short = tokens_of(4, 500), tokens_of(5, 20)
    expected = alone(engine, prompt, prompt_logprobs=1)
    long = sequence_of(prompt, prompt_logprobs=1)
    failed = fail_once(monkeypatch, engine.core._sampler, "sample", RuntimeError("out of luck"))
    given, lost = play(engine, long, sequence_of(short))
    assert failed
    assert isinstance(lost.error, ServiceError)
    assert_same(given, expected)


def test_a_sampler_that_fails_with_nothing_to_choose_fails_nobody(engine, monkeypatch):
    prompt = tokens_of(6, 600)
    expected = alone(engine, prompt)
    failed = fail_once(
        monkeypatch, engine.core._sampler, "sample", RuntimeError(), lambda _, chosen: not chosen
    )
    [given] = play(engine, sequence_of(prompt))
    assert failed
    assert_same(given, expected)


@pytest.fixture
def ahead(tiny_model_dir):
    return engine_of(tiny_model_dir, num_pages=100, run_ahead=True)


def break_what_is_launched(engine, monkeypatch):
    """Let the step that is under way fail when it is collected, after the next one's launch."""
    launched = engine.core._launched
    assert launched is not None

    def fail():
        raise RuntimeError("out of luck")

    monkeypatch.setattr(launched.sampled, "result", fail)


@pytest.mark.parametrize("length", [6 * BLOCK + 9, 25 * BLOCK])  # whose next step completes it
def test_whoever_took_over_pages_of_a_step_that_fails_is_not_served_from_them(
    ahead, monkeypatch, length
):
    stem = tokens_of(7, 6 * BLOCK)
    follower = stem + tokens_of(8, length - len(stem))
    expected = alone(ahead, follower)
    core, first, second = ahead.core, sequence_of(stem + tokens_of(9, 5)), sequence_of(follower)
    core.add(first)
    core.step()
    core.add(second)
    break_what_is_launched(ahead, monkeypatch)
    got = step(core).get(second, Update())  # launches what reads those pages
    while core.has_work:
        updates = step(core)
        got = got + updates[second] if second in updates else got
    if length < 10 * BLOCK:
        assert isinstance(got.error, ServiceError), "its token was chosen from those pages"
    else:
        assert_same(got, expected)
        assert second.num_cached_tokens == 0
    third = sequence_of(follower)
    play(ahead, third)
    assert third.num_cached_tokens == (0 if length < 10 * BLOCK else 24 * BLOCK)


def test_what_a_step_that_fails_was_to_write_is_not_found_if_its_sequence_has_left(
    ahead, monkeypatch
):
    core, prompt = ahead.core, tokens_of(10, 6 * BLOCK)
    left = sequence_of(prompt)
    core.add(left)
    core.step()
    break_what_is_launched(ahead, monkeypatch)
    core.abort(left, "client")
    assert step(core) == {}
    following = sequence_of(prompt)
    play(ahead, following)
    assert following.num_cached_tokens == 0
    play(ahead, again := sequence_of(prompt))
    assert again.num_cached_tokens == 5 * BLOCK


def test_reports_that_all_fail_concern_nobody_who_did_not_ask(engine, monkeypatch):
    core = engine.core
    waiting, asking = sequence_of(tokens_of(11, 30)), sequence_of([5] * 20, prompt_logprobs=1)
    waiting.arrived_at += 1
    expected = alone(engine, tokens_of(11, 30))
    fail_once(monkeypatch, core._sampler, "report_prompts", RuntimeError("out of luck"))
    core.add(asking)
    assert step(core).get(asking, Update()).error is not None
    [given] = play(engine, waiting)
    assert_same(given, expected)
    monkeypatch.undo()
    prompt = tokens_of(12, 300)  # a step that chooses nothing
    expected = alone(engine, prompt, prompt_logprobs=1)
    fail_once(monkeypatch, core._sampler, "report_prompts", RuntimeError("out of luck"))
    given, other = play(engine, sequence_of(prompt, prompt_logprobs=1), sequence_of([9] * 400))
    assert_same(given, expected)
    assert other.error is None
