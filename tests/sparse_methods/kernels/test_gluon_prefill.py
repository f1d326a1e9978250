"""What of the Gluon kernels can be told without a device: that they compile, and who takes over."""

import logging
import os
import subprocess
import sys

import pytest
import torch

from sparse_methods.kernels import gluon_prefill, triton_prefill
from sparse_methods.kernels.operation import LayerGeometry

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
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    shared = [int(line) for line in result.stdout.split()]
    assert len(shared) == 8
    assert min(shared) > 0
    assert max(shared) <= SHARED_BYTES


def fails_with(error):
    def attend(*_):
        raise error

    return attend


def test_what_does_not_compile_is_named_once_and_left_to_triton(monkeypatch, caplog):
    monkeypatch.setattr(
        gluon_prefill, "attend", fails_with(RuntimeError("PassManager::run failed"))
    )
    with caplog.at_level(logging.WARNING):
        gluon_prefill.prepare(PLAIN, torch.bfloat16, CPU)
        gluon_prefill.prepare(PLAIN, torch.bfloat16, CPU)
    assert len(caplog.records) == 4  # with and without lists, with and without thresholds
    assert all("PassManager::run failed" in record.getMessage() for record in caplog.records)


def test_short_memory_is_no_verdict_on_a_kernel(monkeypatch):
    monkeypatch.setattr(gluon_prefill, "attend", fails_with(torch.OutOfMemoryError("full")))
    with pytest.raises(torch.OutOfMemoryError):
        gluon_prefill.prepare(PLAIN, torch.bfloat16, CPU)


def test_nothing_is_tried_where_it_cannot_run(monkeypatch):
    monkeypatch.setattr(gluon_prefill, "attend", fails_with(AssertionError("tried")))
    triton_prefill.prepare(PLAIN, torch.bfloat16, CPU)
    for geometry, dtype in [
        (PLAIN, torch.float32),
        (LayerGeometry(8, 2, 96, 96, scale=0.1), torch.bfloat16),
        (LayerGeometry(8, 2, 128, 64, scale=0.1), torch.bfloat16),
        (LayerGeometry(8, 2, 128, 128, scale=0.1, window=64), torch.bfloat16),
    ]:
        gluon_prefill.prepare(geometry, dtype, CPU)
