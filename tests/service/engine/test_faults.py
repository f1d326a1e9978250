"""Faults put in one by one: who fails, who goes on unchanged, what is counted, what is left."""

import asyncio
import threading

import pytest
import torch

from service.engine.events import FaultKind
from service.engine.faults import diagnose
from service.errors import (
    GenerationError,
    ServiceError,
    TokenizerError,
    UnavailableError,
)
from service.models.method_fault import MethodFaultError
from sparse_methods import get_sparse_method
from tests.service.engine.test_engine import collect, prompt_of, request, run, running, wait_until

SKIP = {"prefill_threshold": 0.2, "decode_threshold": 0.2}


@pytest.fixture(params=[False, True], ids=["waits", "runs-ahead"])
def run_ahead(request):
    return request.param


@pytest.fixture
def engine(tiny_model_dir, run_ahead):
    with running(tiny_model_dir, run_ahead=run_ahead) as one:
        one.events.kinds = []
        one.events.engine_error = one.events.kinds.append
        yield one
        wait_until(lambda: one.status().num_pages_used == 0)
        assert one._loop.num_unfinished == 0


def together(engine, *requests):
    """What each request gets, an exception included, when all are there in the same step."""

    async def gather():
        # Nothing runs until all have come.
        held = engine.core._scheduler.schedule
        engine.core._scheduler.schedule = lambda **_: []
        tasks = [asyncio.ensure_future(collect(engine, one)) for one in requests]
        await asyncio.to_thread(wait_until, lambda: engine.core.num_waiting == len(requests))
        engine.core._scheduler.schedule = held
        return await asyncio.gather(*tasks, return_exceptions=True)

    return asyncio.run(gather())


def boom(*_, **__):
    raise RuntimeError("out of luck")


def raise_at(call, error):
    """A function that raises ``error`` at its ``call``-th call only."""
    state = {"calls": 0}

    def wrap(original):
        def wrapped(*args, **kwargs):
            state["calls"] += 1
            if state["calls"] == call:
                raise error
            return original(*args, **kwargs)

        return wrapped

    return wrap


def innocents():
    """Requests that leave traces in page summaries and page scores, and such that do not."""
    methods = ("dense", "quest", "snapkv", "streaming", "xattention")
    return [
        request(prompt_of(300 + 50 * index, seed=index), method, knobs_of(method), max_tokens=8)
        for index, method in enumerate(methods)
    ]


def knobs_of(method):
    return {} if method == "dense" else {"dense_below": 0}


def same(given, expected):
    assert given[0] == expected[0]
    assert given[1] == expected[1]
    assert given[2][0].statistics == expected[2][0].statistics


@pytest.mark.parametrize(
    ("hook", "method", "call"),
    [
        ("select_prefill", "xattention", 1),  # the first layer
        ("select_prefill", "xattention", 2),  # the second: the others' first layer is computed
        ("select_decode", "streaming", 1),
        ("select_decode", "streaming", 6),
        ("skip_threshold", "flash_skip_softmax", 1),
        ("skip_threshold", "flash_skip_softmax", 7),
        ("score_pages", "snapkv", 2),
    ],
)
def test_a_method_that_raises_fails_its_own_request_only(engine, monkeypatch, hook, method, call):
    others = innocents()
    expected = [run(engine, one)[0] for one in others]
    # Knobs of its own, so that no other method of the step is equal to it.
    knobs = {"dense_below": 1, **(SKIP if method == "flash_skip_softmax" else {})}
    guilty = request(prompt_of(400, seed=9), method, knobs, max_tokens=8)
    cls, calls = type(guilty.method), 0
    original = getattr(cls, hook)

    def broken(self, *args, **kwargs):
        nonlocal calls
        if self == guilty.method:
            calls += 1
            if calls >= call:
                raise ZeroDivisionError("a bug of the method")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(cls, hook, broken)
    failed, *fine = together(engine, guilty, *others)
    assert isinstance(failed, MethodFaultError), failed
    assert method in str(failed)
    for given, alone in zip(fine, expected, strict=True):
        same(given, alone)
    assert engine.events.kinds == [FaultKind.METHOD]
    assert engine.status().is_alive
    # Those of quest and snapkv: sums that some layers had added to must not be added to twice.
    assert engine.events.num_preempted == 2


def test_of_two_prompts_with_the_same_method_only_the_one_that_raises_fails(engine, monkeypatch):
    guilty, other = (
        request(prompt_of(n), "xattention", knobs_of("xattention"), max_tokens=4)
        for n in (400, 500)
    )
    [expected] = run(engine, other)
    cls = type(guilty.method)
    original = cls.select_prefill

    def broken(self, view):
        if view.prompt_len == 400:
            raise ZeroDivisionError
        return original(self, view)

    monkeypatch.setattr(cls, "select_prefill", broken)
    failed, fine = together(engine, guilty, other)
    assert isinstance(failed, MethodFaultError)
    same(fine, expected)


def test_a_method_that_nobody_runs_is_believed_once(engine, monkeypatch):
    """Or a step that fails for somebody who is not there would be tried for ever."""
    nobody = MethodFaultError(get_sparse_method("streaming")({"window_blocks": 7}))
    original = engine.runner.run
    monkeypatch.setattr(engine.runner, "run", raise_at(1, nobody)(original))
    assert len(run(engine, request(prompt_of(20)))[0][0][0]) == 8

    def always(_chunks):
        engine.runner.num_runs += 1
        raise nobody

    monkeypatch.setattr(engine.runner, "run", always)
    with pytest.raises(MethodFaultError):
        run(engine, request(prompt_of(20)))
    assert engine.events.kinds == [FaultKind.METHOD] * 3


def test_memory_that_is_short_before_a_run_begins_is_not_waited_for_for_ever(engine, monkeypatch):
    def always(_chunks):
        raise torch.OutOfMemoryError("before anything ran")

    monkeypatch.setattr(engine.runner, "run", always)
    with pytest.raises(UnavailableError):
        run(engine, request(prompt_of(20)))
    assert engine.events.kinds == [FaultKind.MEMORY] * 2


def test_the_first_lack_of_memory_fails_nobody(engine, monkeypatch):
    requests = innocents()
    expected = [run(engine, one)[0] for one in requests]
    out_of_memory = raise_at(3, torch.OutOfMemoryError("CUDA out of memory"))
    attention = engine.runner.attention
    monkeypatch.setattr(attention, "implementation", out_of_memory(attention.implementation))
    for given, alone in zip(together(engine, *requests), expected, strict=True):
        same(given, alone)
    assert engine.events.kinds == [FaultKind.MEMORY]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9999 bytes"),
        MemoryError(),
    ],
)
def test_who_takes_the_most_fails_if_memory_stays_short(engine, monkeypatch, error):
    small, large = request(prompt_of(40)), request(prompt_of(900))
    [expected] = run(engine, small)
    original = engine.runner._forward

    def forward(token_ids, *args):
        if len(token_ids) > 500:
            raise error
        return original(token_ids, *args)

    monkeypatch.setattr(engine.runner, "_forward", forward)
    failed, fine = together(engine, large, small)
    assert isinstance(failed, UnavailableError)
    assert "memory" in str(failed)
    same(fine, expected)
    assert engine.events.kinds == [FaultKind.MEMORY] * 2
    assert engine.status().is_alive


def test_an_error_lets_go_of_what_its_frames_hold_before_memory_is_freed(engine, monkeypatch):
    class Held:
        def __del__(self):
            freed.append("tensor")

    freed: list[str] = []
    original = engine.runner._forward

    def forward(*args):
        if not freed:
            held = Held()
            raise torch.OutOfMemoryError(str(type(held)))
        return original(*args)

    monkeypatch.setattr(engine.runner, "_forward", forward)
    monkeypatch.setattr(engine.runner, "free_memory", lambda: freed.append("cache"))
    run(engine, request(prompt_of(20)))
    assert freed == ["tensor", "cache"]


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


def poison(engine, monkeypatch, prompt_start):
    """Make everything that is computed for prompts of this first token not a number."""
    embed = engine.runner._model.get_input_embeddings()

    def spoil(_module, args, output):
        ids = args[0]
        is_bad = (ids == prompt_start).cumsum(-1) > 0
        return torch.where(is_bad[..., None], torch.nan, output)

    return embed.register_forward_hook(spoil)


@pytest.mark.parametrize("method", ["dense", "quest", "snapkv", "flash_skip_softmax", "streaming"])
def test_numbers_that_are_none_do_not_live_on_in_the_pages(engine, monkeypatch, method):
    following = [
        request(prompt_of(n, seed=n), method, knobs_of(method), max_tokens=12)
        for n in (5, 130, 250)
    ]
    expected = [run(engine, one)[0] for one in following]
    hook = poison(engine, monkeypatch, 99)
    with pytest.raises(GenerationError, match="not a number"):
        run(engine, request([99, *prompt_of(1000)], method, knobs_of(method)))
    hook.remove()
    assert engine.events.kinds == [FaultKind.NUMBERS]
    wait_until(lambda: engine.status().num_pages_used == 0)
    for one, alone in zip(following, expected, strict=True):
        same(run(engine, one)[0], alone)


class Panic(BaseException):
    """Stands in for a panic of the tokenizer's library."""


Panic.__module__ = "pyo3_runtime"


@pytest.mark.parametrize("error", [ValueError("the prompt"), Panic("the prompt")])
def test_a_tokenizer_that_cannot_encode_fails_the_request_only(engine, monkeypatch, error):
    class Broken:
        def encode(self, _text):
            raise error

    with monkeypatch.context() as broken:
        broken.setattr(engine.tokenizer, "_backend", Broken())
        one = request(None)
        object.__setattr__(one, "prompt", "some text")
        with pytest.raises(TokenizerError) as told:
            run(engine, one)
    assert "the prompt" not in str(told.value)
    assert engine.events.kinds == [FaultKind.TOKENIZER]
    assert len(run(engine, request(prompt_of(20)))[0][0][0]) == 8


@pytest.mark.parametrize("error", [ValueError("a token"), Panic("a token")])
def test_a_tokenizer_that_cannot_decode_fails_the_request_only(engine, monkeypatch, error):
    other = request(prompt_of(30, seed=1))
    [expected] = run(engine, other)
    [(tokens, _, _)] = run(engine, request(prompt_of(20)))
    bad = next(t for t in tokens[0] if t not in expected[0][0])
    original = engine.tokenizer._find_bytes

    def find_bytes(token_id):
        if token_id == bad:
            raise error
        return original(token_id)

    monkeypatch.setattr(engine.tokenizer, "_find_bytes", find_bytes)
    engine.tokenizer._bytes.clear()
    failed, fine = together(engine, request(prompt_of(20)), other)
    assert isinstance(failed, TokenizerError)
    same(fine, expected)
    assert engine.events.kinds == [FaultKind.TOKENIZER]


def test_steps_that_fail_in_a_row_end_the_engine(tiny_model_dir, run_ahead, monkeypatch):
    monkeypatch.setattr("service.engine.loop.MAX_FAILED_STEPS", 3)
    with running(tiny_model_dir, run_ahead=run_ahead) as one:
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


def test_faults_of_somebody_in_particular_do_not_end_the_engine(engine, monkeypatch):
    guilty = request(prompt_of(400), "xattention", knobs_of("xattention"))
    monkeypatch.setattr(type(guilty.method), "select_prefill", boom)
    for _ in range(12):
        with pytest.raises(MethodFaultError):
            run(engine, guilty)
    assert engine.status().is_alive


def test_a_device_that_answers_no_more_ends_the_engine_and_everybody_is_told(
    tiny_model_dir, run_ahead, monkeypatch
):
    with running(tiny_model_dir, run_ahead=run_ahead, max_running_requests=1) as one:
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
    with running(tiny_model_dir) as one:

        def panic():
            raise Panic("a secret")

        monkeypatch.setattr(one.core, "step", panic)
        with pytest.raises(UnavailableError, match="cannot go on"):
            run(one, request(prompt_of(5)))
        wait_until(lambda: not one.is_busy)
        assert "secret" not in one.status().reason
        assert one.status().num_pages_used == 0


def test_a_step_that_hangs_is_given_up_and_its_pages_are_free_if_it_ever_returns(
    tiny_model_dir, run_ahead, monkeypatch
):
    with running(tiny_model_dir, run_ahead=run_ahead, stall_timeout_s=0.1) as one:
        one.events.kinds = []
        one.events.engine_error = one.events.kinds.append
        goes_on = threading.Event()
        original = one.runner.run

        def hang(chunks):
            goes_on.wait(20)
            return original(chunks)

        monkeypatch.setattr(one.runner, "run", hang)

        async def ask():
            async with await one.submit(request(prompt_of(5))) as generation:
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


def test_what_clients_are_told_is_ours_and_never_what_was_raised():
    kind, error = diagnose(RuntimeError("/secret/path.py"))
    assert (kind, type(error)) == (FaultKind.STEP, GenerationError)
    assert "secret" not in str(error)
    fault = MethodFaultError(get_sparse_method("dense")())
    fault.__cause__ = torch.OutOfMemoryError("12 GiB")
    kind, error = diagnose(fault)
    assert kind is FaultKind.MEMORY
    assert "GiB" not in str(error)
    assert isinstance(error, ServiceError)


def test_an_error_that_interrupted_another_is_not_blamed_on_that_one():
    def interrupted():
        try:
            raise MethodFaultError(get_sparse_method("dense")())
        finally:
            boom()

    with pytest.raises(RuntimeError) as raised:
        interrupted()
    assert isinstance(raised.value.__context__, MethodFaultError)
    assert diagnose(raised.value)[0] is FaultKind.STEP
