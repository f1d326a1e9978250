"""The kernels of probed rows against the eager rule of ``predictive_skip``."""

import pytest
import torch

from sparse_methods.kernels import selection, triton_probes
from sparse_methods.methods.predictive_skip_v1 import PredictiveSkip
from tests.sparse_methods import paged
from tests.sparse_methods.kernels.cases import DEVICE

HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16  # as the interpreter allows
CASES = {  # tokens, heads, KV heads, head dim, block size, where a chunk starts, dtype
    "mha": (500, 2, 2, 16, 32, 0, torch.float32),
    "groups of 3": (161, 3, 1, 64, 32, 0, torch.float32),
    "groups of 4": (300, 4, 1, 96, 32, 64, torch.float32),
    "groups of 8": (200, 8, 1, 128, 32, 32, HALF),
    "one tile": (128, 2, 1, 16, 128, 0, torch.float32),
    "one row": (257, 2, 1, 16, 128, 256, torch.float32),
}


@pytest.fixture(autouse=True)
def _eager(monkeypatch):
    """What is compared with, on any device."""
    monkeypatch.setattr(selection, "has_kernels", lambda tensor: False)


def view_of(case):
    num_tokens, heads, kv_heads, head_dim, block_size, start, dtype = CASES[case]
    generator = torch.Generator().manual_seed(0)
    draw = lambda count: torch.randn(num_tokens, count, head_dim, generator=generator)  # noqa: E731
    query, keys = 3 * draw(heads).to(dtype), draw(kv_heads).to(dtype)
    view = paged.prefill_view(query, keys, start=start, block_size=block_size)
    return paged.on(view, DEVICE)


def probe_of(method):
    return triton_probes.Probe(method.knobs.probe_rows, method.knobs.probe_keys, method._reach)


@pytest.mark.parametrize("knobs", [{"probe_rows": 3, "probe_keys": 4}, {"probe_keys": 1}])
@pytest.mark.parametrize("case", CASES)
def test_blocks_are_those_of_the_rule(case, knobs):
    method, view = PredictiveSkip({"threshold": 0.5, "margin": 0.2, **knobs}), view_of(case)
    assert triton_probes.can_probe(view, probe_of(method))
    expected = method._kept(view)
    assert torch.equal(triton_probes.near_largest(view, probe_of(method)), expected)
    if case == "mha" and knobs["probe_keys"] == 4:
        assert (expected.sum() < expected.shape[0] * view.visible.sum()).item()


def test_a_slab_of_tiles_at_a_time_gives_the_same(monkeypatch):
    method, view = PredictiveSkip({"threshold": 0.5, "margin": 0.2}), view_of("mha")
    whole = triton_probes.near_largest(view, probe_of(method))
    monkeypatch.setattr(triton_probes, "_MAX_HELD", 3 * 2 * 8 * 16)
    assert torch.equal(triton_probes.near_largest(view, probe_of(method)), whole)


@pytest.mark.parametrize("knobs", [{"probe_keys": 12}, {"probe_rows": 64}])
def test_what_kernels_cannot_probe_is_known(knobs):
    view = view_of("groups of 3")  # of which 64 rows are too many for a program
    assert triton_probes.can_probe(view, probe_of(PredictiveSkip({})))
    assert not triton_probes.can_probe(view, probe_of(PredictiveSkip(knobs)))
