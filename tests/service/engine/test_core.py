"""An engine that runs ahead gives everybody exactly what one that waits for each step gives."""

import asyncio
import re
from dataclasses import replace

import pytest

from service.engine.generation import build_sequence
from service.engine.grammar import Grammar, GrammarCompiler
from service.engine.sequence import FinishReason, SamplingParams, Sequence
from service.errors import GenerationError
from sparse_methods import get_sparse_method
from sparse_methods.statistics import RequestStatistics
from tests.service.engine.stepping import (
    BLOCK,
    IDS,
    Request,
    assert_alike,
    engine_of,
    play,
    requests_of,
)

EIGHT = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def engines(tiny_model_dir):
    """One that waits for each step, and one that runs ahead."""
    return [engine_of(tiny_model_dir, run_ahead=run_ahead) for run_ahead in (False, True)]


@pytest.fixture
def ahead(tiny_model_dir):
    return engine_of(tiny_model_dir, run_ahead=True)


@pytest.mark.parametrize("seed", range(20))
def test_random_requests_get_the_same_tokens_texts_reasons_and_statistics(engines, seed):
    requests = requests_of(seed)
    waited, ran_ahead = (play(engine.core, requests) for engine in engines)
    for (_, expected), (_, given) in zip(waited, ran_ahead, strict=True):
        assert_alike(given, expected)


def test_the_random_requests_run_out_of_pages(engines):
    """What the test above relies on, whichever of its seeds ran."""
    requests = [request for seed in range(6) for request in requests_of(seed)]
    for engine in engines:
        engine.events.num_tokens = engine.events.num_preempted = 0
        play(engine.core, requests)
        assert engine.events.num_preempted > 0


@pytest.mark.parametrize("seed", range(4))
def test_a_grammar_holds_whoever_runs_ahead_or_gives_way(engines, seed):
    digits = Grammar("regex", "[0-9]{4}( [0-9]{4}){1,8}", "response_format")
    matcher = asyncio.run(GrammarCompiler(engines[0].tokenizer).matcher(digits))
    requests = requests_of(seed)
    for request in requests[::2]:
        request.matcher = matcher
        request.sampling = SamplingParams(max_tokens=60, seed=seed)
    waited, ran_ahead = (play(engine.core, requests) for engine in engines)
    for request, (_, expected), (_, given) in zip(requests, waited, ran_ahead, strict=True):
        assert_alike(given, expected)
        if request.matcher is not None:
            assert given.finish is not None
            assert given.finish.reason is FinishReason.STOP
            assert re.fullmatch(digits.source, given.text)


@pytest.mark.parametrize("method_id", IDS)
def test_a_row_behind_the_end_counts_nowhere(engines, method_id):
    prompt = list(range(10, 10 + 5 * BLOCK))
    greedy = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    [(sequence, _)] = play(engines[0].core, [Request(prompt, method_id, greedy)])
    last = sequence.output_ids[5]
    stopped = replace(greedy, stop_token_ids=(last,))
    results = []
    for engine in engines:
        engine.events.num_tokens = 0
        [(_, update)] = play(engine.core, [Request(prompt, method_id, stopped)])
        results.append((update, engine.events.num_tokens))
    (expected, num_tokens), (given, num_tokens_ahead) = results
    assert_alike(given, expected)
    assert given.finish is not None
    assert given.finish.reason is FinishReason.STOP
    assert num_tokens_ahead == num_tokens + 1, "nothing ran ahead"


def test_no_row_runs_behind_the_last_token_that_a_request_may_have(engines):
    for engine in engines:
        engine.events.num_tokens = 0
        greedy = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
        play(engine.core, [Request([5] * 30, "dense@v1", greedy)])
        assert engine.events.num_tokens == 30 + 8


@pytest.mark.parametrize("aborted_at", [1, 2, 3, 7, 11, 12, 13])
def test_an_abort_at_any_step_counts_what_was_generated_and_disturbs_nobody(engines, aborted_at):
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    prompts = [[7 + index] * (20 + 20 * index) for index in range(3)]
    requests = [Request(prompt, "streaming@v1", greedy) for prompt in prompts]
    finishes: list[RequestStatistics] = []
    for engine in engines:
        undisturbed = play(engine.core, requests)
        requests[1] = replace(requests[1], aborted_at=aborted_at)
        finished = {}
        engine.core._events = engine.events
        engine.events.finished = lambda s, finish, into=finished: into.update({s: finish})
        disturbed = play(engine.core, requests)
        requests[1] = replace(requests[1], aborted_at=None)
        for index in (0, 2):
            assert_alike(disturbed[index][1], undisturbed[index][1])
        sequence, update = disturbed[1]
        assert sequence.output_ids == undisturbed[1][0].output_ids[: len(sequence.output_ids)]
        assert list(update.token_ids) == sequence.output_ids
        if finished[sequence].reason is FinishReason.ABORT and sequence.output_ids:
            shorter = replace(greedy, max_tokens=len(sequence.output_ids))
            [(_, alone)] = play(engine.core, [replace(requests[1], sampling=shorter)])
            assert alone.finish is not None
            assert finished[sequence].statistics == alone.finish.statistics
            finishes.append(finished[sequence].statistics)
        del engine.events.finished
    assert bool(finishes) == (aborted_at <= 12)


def test_nobody_gives_way_while_a_token_is_pending(engines):
    """The younger one's pending token ends it, just when the older one needs a page of its."""
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    sampling = replace(greedy, repetition_penalty=100.0)  # no token comes twice
    older = Request([9] * (5 * BLOCK - 4), "dense@v1", sampling)
    younger = Request([11] * (6 * BLOCK + 1), "dense@v1", sampling)
    _, (sequence, _) = play(engines[0].core, [replace(older, arrives_at=50), younger])
    fifth = sequence.output_ids[4]
    assert fifth not in sequence.output_ids[:4]
    younger.sampling = replace(sampling, stop_token_ids=(fifth,))
    _, (_, expected) = play(engines[0].core, [replace(older, arrives_at=50), younger])
    for engine in engines:
        engine.events.num_preempted = 0
        _, (_, given) = play(engine.core, [older, younger])
        assert_alike(given, expected)
        assert engine.events.num_preempted == 0


def boom(*_):
    raise RuntimeError("out of luck")


def request(max_tokens: int, index: int = 0) -> Sequence:
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    method = get_sparse_method("dense")()
    return build_sequence(str(index), [50 + index] * 20, method, sampling, index)


def test_what_a_step_produced_is_delivered_when_the_next_one_fails(ahead, monkeypatch):
    core, short, long = ahead.core, request(1), request(5, 1)
    core.add(short)
    core.add(long)
    assert core.step() == {}
    with monkeypatch.context() as broken:
        broken.setattr(ahead.runner, "run", boom)
        with pytest.raises(RuntimeError, match="out of luck"):
            core.step()
    updates = core.fail_step(GenerationError("failed"))
    finish = updates[short].finish
    assert finish is not None
    assert (finish.reason, finish.num_generated_tokens) == (FinishReason.LENGTH, 1)
    assert len(updates[long].token_ids) == 1
    assert isinstance(updates[long].error, GenerationError)
    assert not core.has_work
    assert core.num_pages_used == 0


def test_a_step_that_cannot_be_collected_fails_its_sequences_and_the_next_goes_on(
    ahead, monkeypatch
):
    core, first, second = ahead.core, request(5), request(5, 1)
    core.add(first)
    core.step()
    core.add(second)
    launched = core._launched
    assert launched is not None
    monkeypatch.setattr(launched.sampled, "result", boom)
    with pytest.raises(RuntimeError):
        core.step()  # launches the first token of the second
    updates = core.fail_step(GenerationError("failed"))
    assert list(updates) == [first]
    tokens = []
    while core.has_work:
        tokens += core.step()[second].token_ids
    assert len(tokens) == 5
    assert core.num_pages_used == 0


def test_who_waits_goes_on_when_all_of_a_step_that_failed_have_ended(ahead, monkeypatch):
    core, ending, waiting = ahead.core, request(9), request(2, 1)
    ending.sampling = replace(ending.sampling, stop_token_ids=tuple(range(4096)))
    waiting.prompt_ids *= 9  # more pages than are free
    core.add(ending)
    core.add(waiting)
    core.step()
    with monkeypatch.context() as broken:
        broken.setattr(ahead.runner, "run", boom)
        with pytest.raises(RuntimeError, match="out of luck"):
            core.step()  # what fails is the row behind the end
    updates = core.fail_step(GenerationError("failed"))
    assert list(updates) == [ending]
    assert updates[ending].error is None
    assert updates[ending].finish is not None
    tokens = []
    while core.has_work:
        tokens += [token for update in core.step().values() for token in update.token_ids]
    assert len(tokens) == 2


def test_pages_are_free_at_once_when_a_sequence_in_flight_is_aborted(ahead):
    core, one = ahead.core, request(50)
    core.add(one)
    core.step()
    core.step()
    core.abort(one, "client")
    assert core.num_pages_used == 0
    assert core.has_work, "a step is still to be collected"
    assert core.step() == {}
    assert not core.has_work


def test_ending_the_engine_collects_nothing(ahead):
    core, one = ahead.core, request(50)
    core.add(one)
    core.step()
    updates = core.fail_all(GenerationError("stopped"), "shutdown")
    assert isinstance(updates[one].error, GenerationError)
    assert not core.has_work


def test_a_request_too_short_for_its_method_is_counted_as_a_fallback(ahead):
    for name, dense_below in [("streaming", 100), ("streaming", 0), ("quest", 100), ("quest", 25)]:
        method, sampling = get_sparse_method(name)({"dense_below": dense_below}), EIGHT
        asked = build_sequence(f"{name} {dense_below}", list(range(20)), method, sampling, 0)
        ahead.core.add(asked)
    assert ahead.events.fallbacks == [], "who only decodes may yet come into force"
    while ahead.core.has_work:
        ahead.core.step()
    assert ahead.events.fallbacks == [
        ("streaming 100", "below_break_even"),
        ("quest 100", "below_break_even"),
    ]


def test_who_ended_before_anything_was_computed_did_not_fall_back(ahead):
    method = get_sparse_method("streaming")({"dense_below": 100})
    one = build_sequence("0", list(range(20)), method, EIGHT, 0)
    ahead.core.add(one)
    ahead.core.abort(one, "disconnect")
    assert ahead.events.fallbacks == []
