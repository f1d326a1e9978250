"""A sparse method that raises fails those who asked for it, and nobody else."""

import pytest

from service.engine.events import FaultKind
from service.models.method_fault import MethodFaultError
from sparse_methods import get_sparse_method
from tests.service.engine.driving import prompt_of, request, run
from tests.service.engine.faults.injection import (
    boom,
    innocents,
    knobs_of,
    raise_at,
    same,
    together,
)

SKIP = {"prefill_threshold": 0.2, "decode_threshold": 0.2}


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


def test_faults_of_somebody_in_particular_do_not_end_the_engine(engine, monkeypatch):
    guilty = request(prompt_of(400), "xattention", knobs_of("xattention"))
    monkeypatch.setattr(type(guilty.method), "select_prefill", boom)
    for _ in range(12):
        with pytest.raises(MethodFaultError):
            run(engine, guilty)
    assert engine.status().is_alive


def test_a_method_that_cannot_say_whether_it_fell_back_harms_nobody(engine, monkeypatch):
    """It is asked when its work is done: nobody can start over then, and the engine must go on."""
    guilty = request(prompt_of(100), "streaming", {"dense_below": 1}, max_tokens=8)
    [expected, other] = (run(engine, one)[0] for one in (guilty, request(prompt_of(20))))
    monkeypatch.setattr(type(guilty.method), "fallback", boom)
    both = together(engine, guilty, request(prompt_of(20)))
    for given, alone in zip(both, (expected, other), strict=True):
        same(given, alone)
    assert engine.status().is_alive
