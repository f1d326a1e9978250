"""Memory that is short: a first time fails nobody, a second time who takes the most."""

import pytest
import torch

from service.engine.events import FaultKind
from service.errors import UnavailableError
from tests.service.engine.driving import prompt_of, request, run
from tests.service.engine.faults.injection import innocents, raise_at, same, together


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


def test_memory_that_is_short_before_a_run_begins_is_not_waited_for_for_ever(engine, monkeypatch):
    def always(_chunks):
        raise torch.OutOfMemoryError("before anything ran")

    monkeypatch.setattr(engine.runner, "run", always)
    with pytest.raises(UnavailableError):
        run(engine, request(prompt_of(20)))
    assert engine.events.kinds == [FaultKind.MEMORY] * 2


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
