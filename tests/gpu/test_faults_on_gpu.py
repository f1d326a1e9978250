"""Faults where the device matters: a graph being captured, no memory, a dead context."""

from typing import Any

import pytest
import torch

from service.engine.core import EngineCore
from service.engine.generation import build_sequence
from service.engine.sequence import SamplingParams, Sequence, Update
from service.errors import UnavailableError
from service.models.method_fault import MethodFaultError
from sparse_methods import get_sparse_method
from tests.e2e.conftest import Server
from tests.gpu.test_engine_on_gpu import engine_on, planted_prompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(300),
]
KILLS_THE_DEVICE = """
import torch, service.engine.core
def step(self):
    index = torch.tensor([99], device="cuda")
    return torch.ones(1, device="cuda")[index].item()
service.engine.core.EngineCore.step = step
"""


def sequence_of(prompt: list[int], name: str, knobs: dict[str, Any] | None = None) -> Sequence:
    sampling = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    return build_sequence(name, prompt, get_sparse_method(name)(knobs), sampling, 0)


def play(core: EngineCore, *sequences: Sequence) -> list[Update]:
    """What each sequence gets, faults included; what the engine thread does."""
    got = dict.fromkeys(sequences, Update())
    for sequence in sequences:
        core.add(sequence)
    while core.has_work:
        try:
            updates = core.step()
        except Exception as error:  # noqa: BLE001 - whatever the step raised
            updates = core.fail_step(error)
        for sequence, update in updates.items():
            got[sequence] += update
    assert core.num_pages_used == 0
    return list(got.values())


@pytest.fixture(scope="module")
def on_gpu():
    return engine_on("cuda")


@pytest.mark.parametrize("other", ["dense", "quest", "block_topk", "snapkv"])
def test_a_method_that_raises_while_a_step_is_captured_fails_alone(on_gpu, monkeypatch, other):
    prompt = planted_prompt(on_gpu, 1000)
    [expected] = play(on_gpu.core, sequence_of(prompt, other))
    guilty = sequence_of(prompt[:700], "streaming", {"window_blocks": 3, "dense_below": 0})
    original = type(guilty.method).select_decode

    def select_decode(self, view):
        if self == guilty.method:
            raise ZeroDivisionError
        return original(self, view)

    monkeypatch.setattr(type(guilty.method), "select_decode", select_decode)
    failed, fine = play(on_gpu.core, guilty, sequence_of(prompt, other))
    assert isinstance(failed.error, MethodFaultError)
    assert fine.token_ids == expected.token_ids
    assert fine.finish is not None
    assert expected.finish is not None
    assert fine.finish.statistics == expected.finish.statistics
    monkeypatch.undo()
    [again] = play(on_gpu.core, sequence_of(prompt, other))
    assert again.token_ids == expected.token_ids


def test_a_real_lack_of_memory_fails_the_largest_and_frees_what_it_held(on_gpu, monkeypatch):
    small = planted_prompt(on_gpu, 200)
    [expected] = play(on_gpu.core, sequence_of(small, "dense"))
    original = on_gpu.runner._forward

    def forward(token_ids, *args):
        held = torch.empty(2**28, dtype=torch.uint8, device="cuda")  # by the frame that raises
        if len(token_ids) > 500:
            torch.empty(2**50, dtype=torch.uint8, device="cuda")
        del held
        return original(token_ids, *args)

    monkeypatch.setattr(on_gpu.runner, "_forward", forward)
    before = torch.cuda.memory_allocated()
    large = sequence_of(planted_prompt(on_gpu, 1800), "dense")
    failed, fine = play(on_gpu.core, large, sequence_of(small, "dense"))
    assert isinstance(failed.error, UnavailableError)
    assert fine.token_ids == expected.token_ids
    assert torch.cuda.memory_allocated() - before < 2**27
    assert on_gpu.runner.answers


def test_a_dead_context_ends_the_process():
    server = Server("--device", "cuda", prelude=KILLS_THE_DEVICE)
    try:
        server.wait_ready(300)
        answer = server.client.post("/generate", json={"prompt": "p"})
        assert answer.status_code in {500, 503}
        assert server.process.wait(60) == 1
    finally:
        server.close()
    assert "the device answers no more" in server.output
