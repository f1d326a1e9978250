"""What of the Gluon kernels can be told without a device: that they compile, and who takes over."""

import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparse_methods import kernels
from sparse_methods.kernels import gluon_prefill, reference, triton_prefill
from sparse_methods.kernels.operation import LayerGeometry
from sparse_methods.kernels.triton_workspace import Workspace
from tests.sparse_methods.kernels.cases import build, lists_of, on_float32

SHARED_BYTES = 227 << 10  # what a block may use on Hopper
PLAIN = LayerGeometry(8, 2, 128, 128, scale=0.1)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_trial_is_remembered():
    gluon_prefill._compiles.cache_clear()
    yield
    gluon_prefill._compiles.cache_clear()


@pytest.mark.timeout(300)
def test_every_variant_compiles_for_hopper(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "tests.sparse_methods.kernels.compile_for_hopper"],
        cwd=Path(__file__).parents[3],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    shared = [int(line) for line in result.stdout.split()]
    assert len(shared) == 16
    assert min(shared) > 0
    assert max(shared) <= SHARED_BYTES


def failing():
    """A compiler's error as Triton raises it: around the reason lies the source."""
    reason = RuntimeError("async_copy_global_to_shared has been removed")
    raise ValueError("at 63:8:\n" + "    accumulator *= rescale\n" * 50) from reason


def test_what_does_not_compile_is_named_once_with_the_reason(monkeypatch, caplog):
    monkeypatch.setattr(gluon_prefill, "attend", lambda *_: failing())
    with caplog.at_level(logging.WARNING):
        gluon_prefill.prepare(PLAIN, torch.bfloat16, 128, CPU)
        gluon_prefill.prepare(PLAIN, torch.bfloat16, 128, CPU)
    assert len(caplog.records) == 4  # with and without lists, with and without thresholds
    assert all("has been removed" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("has_lists", [False, True])
def test_triton_takes_over_what_does_not_compile(monkeypatch, has_lists):
    tried = []

    def attend(*inputs):
        tried.append(inputs)
        failing()

    monkeypatch.setattr(gluon_prefill, "attend", attend)
    monkeypatch.setattr(triton_prefill, "_gluon", lambda _: gluon_prefill)
    geometry = LayerGeometry(2, 1, 64, 64, scale=0.125)
    inputs = build(geometry, [(0, 150)], 128, torch.float16)
    if has_lists:
        inputs = replace(inputs, lists=lists_of(inputs, lambda tile, head, visible: visible[-1:]))
    workspace = Workspace.allocate(inputs)
    triton_prefill.prefill(inputs, inputs.tiles.prefill_indices, workspace)
    assert len(tried) == 1
    expected = reference.attend(on_float32(inputs))
    torch.testing.assert_close(workspace.output.float(), expected.output, atol=8e-3, rtol=8e-3)


def test_triton_takes_over_what_is_not_imported(monkeypatch, caplog):
    monkeypatch.setattr(triton_prefill, "cuda_major", lambda _: 9)
    monkeypatch.delattr(kernels, "gluon_prefill")
    monkeypatch.setitem(sys.modules, "sparse_methods.kernels.gluon_prefill", None)
    triton_prefill._gluon.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert triton_prefill._gluon(CPU) is None
    triton_prefill._gluon.cache_clear()
    assert "does not import the Gluon kernels" in caplog.text


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("Triton Error: out of memory")],
)
def test_short_memory_is_no_verdict_on_a_kernel(monkeypatch, error):
    def attend(*_):
        raise error

    monkeypatch.setattr(gluon_prefill, "attend", attend)
    with pytest.raises(type(error), match="out of memory"):
        gluon_prefill.prepare(PLAIN, torch.bfloat16, 128, CPU)


def test_nothing_is_tried_where_it_cannot_run(monkeypatch):
    tried = []
    monkeypatch.setattr(gluon_prefill, "attend", lambda *inputs: tried.append(inputs))
    triton_prefill.prepare(PLAIN, torch.bfloat16, 128, CPU)
    for geometry, dtype, block_size in [
        (PLAIN, torch.float32, 128),
        (PLAIN, torch.bfloat16, 64),
        (replace(PLAIN, head_dim=96, value_dim=96), torch.bfloat16, 128),
        (replace(PLAIN, value_dim=64), torch.bfloat16, 128),
        (replace(PLAIN, window=64), torch.bfloat16, 128),
    ]:
        gluon_prefill.prepare(geometry, dtype, block_size, CPU)
    assert not tried
    gluon_prefill.prepare(PLAIN, torch.bfloat16, 128, CPU)
    assert len(tried) == 4
