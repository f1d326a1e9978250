"""Kernels that are launched while another runs must wait before they touch what it wrote."""

import ast
from pathlib import Path

import pytest
import torch

from service.models.kernels import triton_modules
from service.models.kernels.operations import Norm
from sparse_methods.kernels import triton_launch
from sparse_methods.kernels.triton_launch import as_dependent

ROOT = Path(__file__).parent.parent.parent.parent
KERNELS = {
    function.name: function
    for folder in ("sparse_methods/kernels", "service/models/kernels")
    for path in sorted((ROOT / folder).glob("triton_*.py"))
    for function in ast.parse(path.read_text()).body
    if isinstance(function, ast.FunctionDef)
    and function.name != "await_earlier"
    and any(argument.arg == "IS_DEPENDENT" for argument in function.args.args)
}
TOUCHING = {"load", "store", "atomic_add", "atomic_max", "make_tensor_descriptor"}


def test_nothing_is_launched_as_a_dependent_on_a_cpu():
    assert as_dependent(torch.device("cpu")) == {"IS_DEPENDENT": False}


def test_the_kernels_of_a_decode_step_are_dependents():
    assert {"attend_kernel", "merge_kernel", "_norm_kernel", "_single_row_kernel"} <= set(KERNELS)


@pytest.mark.parametrize("name", KERNELS)
def test_a_dependent_waits_before_it_touches_memory(name):
    """All but weights, which nobody writes: ``_loaded`` may come before."""
    for statement in KERNELS[name].body:
        calls = [n.func for n in ast.walk(statement) if isinstance(n, ast.Call)]
        if any(isinstance(f, ast.Name) and f.id == "await_earlier" for f in calls):
            assert isinstance(statement, ast.Expr), "it must not depend on a condition"
            return
        names = {f.attr if isinstance(f, ast.Attribute) else f.id for f in calls}
        assert not names & TOUCHING
        assert not any(n.startswith("_") for n in names - {"_loaded"}), "a helper may touch memory"
    pytest.fail(f"{name} never waits")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_chain_of_dependents_computes_what_it_computes_one_by_one(monkeypatch):
    norm = Norm(torch.linspace(0.5, 1.5, 4096, device="cuda"), 1e-6, 0.0)
    start = torch.randn(3, 4096, device="cuda")

    def chain():
        rows = start
        for _ in range(200):
            rows = triton_modules.add_rms_norm(rows, start, norm)[1]
        return rows

    chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        overlapping = chain()
    graph.replay()
    monkeypatch.setattr(triton_launch, "_has_dependents", lambda _: False)
    assert torch.equal(overlapping, chain())
