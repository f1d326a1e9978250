"""What was raised, told apart: whose fault it is, and what clients are told of it."""

import dataclasses

import pytest
import torch

from service.engine.events import FaultKind
from service.engine.faults import Triage, diagnose
from service.engine.scheduler import Chunk
from service.errors import GenerationError, ServiceError
from service.models.method_fault import MethodFaultError
from sparse_methods import get_sparse_method
from tests.service.engine.faults.injection import boom
from tests.service.engine.stepping import sequence_of


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


def test_who_is_lost_in_two_steps_at_once_fails_once():
    one = sequence_of([5, 6])
    triage, chunk = Triage(), Chunk(one, 0, 2)

    def choose():
        with triage.choosing([chunk]):
            raise RuntimeError("the device is lost")

    for _ in range(2):  # the step that is launched, and the one before it, which is collected
        with pytest.raises(RuntimeError):
            choose()
    assert triage.judge(RuntimeError(), [one], 1).failed == [one]


def test_who_fails_does_not_start_over_as_well(monkeypatch):
    one = sequence_of([5, 6])
    triage, last = Triage(), Chunk(one, 0, 2)
    part = dataclasses.replace(last, num_tokens=1)
    monkeypatch.setattr("service.engine.faults.num_prompt_rows", lambda _: 1)

    def choose(chunk):
        with triage.choosing([chunk]):
            raise RuntimeError("the device is lost")

    for chunk in (part, part, last):
        with pytest.raises(RuntimeError):
            choose(chunk)
    verdict = triage.judge(RuntimeError(), [one], 1)
    assert (verdict.failed, verdict.restarted) == ([one], [])
