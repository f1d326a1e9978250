"""The Triton passes against the eager ones, in Triton's interpreter where there is no GPU."""

from dataclasses import replace

import pytest
import torch

from service.models.kernels import eager, triton_modules, triton_single_row
from service.models.kernels.operations import Projection
from tests.service.models.kernels.cases import HEADS, draw, norm_of, rotary_case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def moved(value, dtype):
    if value is None:
        return None
    if isinstance(value, torch.Tensor):
        return value.to(DEVICE, dtype)
    return replace(value, weight=moved(value.weight, dtype))


def assert_close(actual, expected):
    assert actual.dtype == expected.dtype
    # Triton's interpreter cuts bfloat16 off where devices round, and a sum is stored on the way.
    units = 3 if expected.dtype == torch.bfloat16 else 1
    tolerance = max(1e-5, units * torch.finfo(expected.dtype).eps)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(1, 3, 33), (1, 2, 3, 16), (4, 1), (2, 1100)])
def test_norms(shape, offset, dtype):
    norm = moved(norm_of(shape[-1], offset), dtype)
    rows, residual = moved(draw(*shape), dtype), moved(draw(*shape, seed=1), dtype)
    assert_close(triton_modules.rms_norm(rows, norm), eager.rms_norm(rows, norm))
    actual = triton_modules.add_rms_norm(residual, rows, norm)
    for mine, expected in zip(actual, eager.add_rms_norm(residual, rows, norm), strict=True):
        assert_close(mine, expected)


def test_a_norm_of_rows_that_lie_apart():
    norm = moved(norm_of(8), torch.float32)
    rows = moved(draw(5, 20), torch.float32)[:, 4:12]
    assert_close(triton_modules.rms_norm(rows, norm), eager.rms_norm(rows, norm))
    actual = triton_modules.add_rms_norm(rows, rows * 2, norm)
    for mine, expected in zip(actual, eager.add_rms_norm(rows, rows * 2, norm), strict=True):
        assert_close(mine, expected)


@pytest.mark.parametrize("num_rows", [1, 2])
def test_products_of_one_row_have_kernels_of_their_own(monkeypatch, num_rows):
    seen = []

    def observed(own):
        def run(*args):
            seen.append(own)
            return own(*args)

        return run

    for name in ("linear", "gated_product"):
        monkeypatch.setattr(triton_single_row, name, observed(getattr(triton_single_row, name)))
    rows, weight = moved(draw(1, num_rows, 9), torch.float32), moved(draw(8, 9), torch.float32)
    projection = Projection(weight, None, (4, 4))
    triton_modules.linear(rows, projection)
    triton_modules.gated_product(rows, projection, "silu")
    assert len(seen) == (2 if num_rows == 1 else 0)


@pytest.mark.parametrize("num_rows", [1, 2])
def test_linear_layers_of_one_row_and_of_more(num_rows):
    rows, weight, bias = draw(1, num_rows, 9), draw(7, 9, seed=1), draw(7, seed=2)
    rows, weight, bias = (moved(tensor, torch.float32) for tensor in (rows, weight, bias))
    projection = Projection(weight, bias, (3, 4))
    assert_close(triton_modules.linear(rows, projection), eager.linear(rows, projection))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("num_rows", "width"), [(3, 7), (1, 1030)])
def test_gated_products(num_rows, width, activation, dtype):
    rows, weight, bias = draw(1, num_rows, 9), draw(2 * width, 9, seed=1), draw(2 * width, seed=2)
    projection = Projection(moved(weight, dtype), moved(bias, dtype), (width, width))
    rows = moved(rows, dtype)
    actual = triton_modules.gated_product(rows, projection, activation)
    assert_close(actual, eager.gated_product(rows, projection, activation))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
def test_rotations(heads, dtype):
    rows, cosines, sines, _ = rotary_case(heads, 5)
    heads = replace(
        heads, query_norm=moved(heads.query_norm, dtype), key_norm=moved(heads.key_norm, dtype)
    )
    rows, cosines, sines = (moved(tensor, dtype) for tensor in (rows, cosines, sines))
    actual = triton_modules.rotate(rows, cosines, sines, heads)
    for mine, expected in zip(actual, eager.rotate(rows, cosines, sines, heads), strict=True):
        assert_close(mine.contiguous(), expected)
