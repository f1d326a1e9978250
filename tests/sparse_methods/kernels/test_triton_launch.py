"""Kernels that are launched while another runs must wait before they touch what it wrote."""

import ast
from pathlib import Path

import pytest
import torch

from service.models.kernels import triton_modules, triton_single_row
from service.models.kernels.operations import Norm, Projection
from sparse_methods.kernels import triton_launch
from sparse_methods.kernels.triton_launch import as_dependent

ROOT = Path(__file__).parent.parent.parent.parent
HARMLESS = {"program_id", "arange", "to"}


def functions_of(source):
    return [f for f in ast.parse(source).body if isinstance(f, ast.FunctionDef)]


KERNELS = {
    function.name: function
    for folder in ("sparse_methods/kernels", "service/models/kernels")
    for path in sorted((ROOT / folder).glob("triton_*.py"))
    for function in functions_of(path.read_text())
    if function.name != "await_earlier"
    and any(argument.arg == "IS_DEPENDENT" for argument in function.args.args)
}
HAZARDS = {
    "it never waits": "x = tl.program_id(0)",
    "a load": "x = tl.load(row)\nawait_earlier(IS_DEPENDENT)",
    "a preload of what is no weight": "x = _loaded(row + 1, mask)\nawait_earlier(IS_DEPENDENT)",
    "an atomic": "tl.atomic_xchg(row, 1)\nawait_earlier(IS_DEPENDENT)",
    "a helper": "x = first_visible(row)\nawait_earlier(IS_DEPENDENT)",
    "a program that ends": "if tl.program_id(0) > 5:\n  return\nawait_earlier(IS_DEPENDENT)",
    "a constant": "await_earlier(False)",
    "a condition": "await_earlier(IS_DEPENDENT) if flag else 0",
    "a branch": "if flag:\n  await_earlier(IS_DEPENDENT)",
}


def names_in(node):
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def why_unsafe(function):
    """What a kernel does before it waits that it must not do; None is nothing.

    It may compute, and load what ``weight`` points to: nobody writes that.
    """
    of_weights = {"weight"}
    for statement in function.body:
        if ast.unparse(statement) == "await_earlier(IS_DEPENDENT)":
            return None
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # the docstring
        is_optional = isinstance(statement, ast.If) and ast.unparse(statement.test) == "IS_GATED"
        for assignment in statement.body if is_optional else [statement]:
            if not isinstance(assignment, ast.Assign):
                return f"line {assignment.lineno} does more than compute a value"
            for call in (n for n in ast.walk(assignment) if isinstance(n, ast.Call)):
                name = ast.unparse(call.func).rpartition(".")[2]
                is_weight = name == "_loaded" and names_in(call.args[0]) & of_weights
                if name not in HARMLESS and not is_weight:
                    return f"line {call.lineno} calls {name}"
            if names_in(assignment.value) & of_weights:
                of_weights |= names_in(assignment.targets[0])
    return "it never waits"


def test_nothing_is_launched_as_a_dependent_on_a_cpu():
    assert as_dependent(torch.device("cpu")) == {"IS_DEPENDENT": False}


def test_the_kernels_of_a_decode_step_are_dependents():
    assert {"attend_kernel", "merge_kernel", "_norm_kernel", "_single_row_kernel"} <= set(KERNELS)


@pytest.mark.parametrize("name", KERNELS)
def test_a_dependent_waits_before_it_touches_memory(name):
    assert why_unsafe(KERNELS[name]) is None


@pytest.mark.parametrize("body", HAZARDS.values(), ids=HAZARDS)
def test_hazards_are_seen(body):
    lines = body.replace("\n", "\n    ")
    [function] = functions_of(f"def kernel(row, weight, IS_DEPENDENT):\n    {lines}\n")
    assert why_unsafe(function) is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_chain_of_dependents_computes_what_it_computes_one_by_one(monkeypatch):
    """Short kernels and long ones, and a sum that forgets nothing that was read too early."""
    norm = Norm(torch.linspace(0.5, 1.5, 2048, device="cuda").bfloat16(), 1e-6, 0.0)
    weight = torch.randn(4096, 2048, device="cuda", dtype=torch.bfloat16) / 2048**0.5
    square, gated = Projection(weight[:2048], None, (2048,)), Projection(weight, None, (2048,) * 2)
    start = torch.randn(1, 2048, device="cuda", dtype=torch.bfloat16)

    def chain():
        total, totals = start, []
        for _ in range(60):
            rows = triton_modules.rms_norm(total, norm)
            rows = triton_single_row.gated_product(rows, gated, "silu")
            total, rows = triton_modules.add_rms_norm(total, rows, norm)
            total = total + triton_single_row.linear(rows, square)
            totals.append(total)
        return torch.stack(totals)

    chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        overlapping = chain()
    graph.replay()
    monkeypatch.setattr(triton_launch, "_has_dependents", lambda _: False)
    assert torch.equal(overlapping, chain())
