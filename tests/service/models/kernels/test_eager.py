"""The passes against the same formulas written out in float64."""

import pytest
import torch
from torch.nn import functional

from service.models.kernels import eager
from service.models.kernels.operations import Norm, Projection, RotaryHeads
from tests.service.models.kernels.cases import HEADS, draw, norm_of, rotary_case, written_out


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(1, 5, 33), (3, 2, 16), (1, 1)])
def test_a_norm_is_the_formula(shape, offset):
    rows, norm = draw(*shape), Norm(draw(shape[-1], seed=1), 1e-2, offset)
    kept = rows.clone()
    torch.testing.assert_close(
        eager.rms_norm(rows, norm).double(), written_out(rows, norm), rtol=1e-5, atol=1e-6
    )
    assert torch.equal(rows, kept)


def test_a_sum_is_normed_as_it_is_stored():
    rows, residual = draw(7, 24).bfloat16(), draw(7, 24, seed=1).bfloat16()
    norm = norm_of(24)
    total, normed = eager.add_rms_norm(residual, rows, norm)
    assert torch.equal(total, residual + rows)
    assert torch.equal(normed, eager.rms_norm(total, norm))


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("silu", functional.silu),
        ("gelu_tanh", lambda x: functional.gelu(x, approximate="tanh")),
    ],
)
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_gated_product_is_the_formula(activation, function, has_bias):
    rows, weight = draw(3, 12), draw(14, 12, seed=1)
    bias = draw(14, seed=2) if has_bias else None
    gate, up = functional.linear(rows, weight, bias).split(7, -1)
    actual = eager.gated_product(rows, Projection(weight, bias, (7, 7)), activation)
    torch.testing.assert_close(actual, function(gate) * up)


@pytest.mark.parametrize("heads", HEADS)
def test_heads_are_normed_and_turned(heads: RotaryHeads):
    rows, cosines, sines, expected = rotary_case(heads, 5)
    for actual, right in zip(eager.rotate(rows, cosines, sines, heads), expected, strict=True):
        torch.testing.assert_close(actual.double(), right, rtol=1e-5, atol=1e-5)
