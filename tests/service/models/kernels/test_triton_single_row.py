"""Linear layers of one row against PyTorch's, in Triton's interpreter where there is no GPU."""

import pytest
import torch
from torch.nn import functional

from service.models.kernels import eager, triton_single_row
from service.models.kernels.operations import Projection
from service.models.kernels.triton_single_row import SingleRowConfig
from tests.service.models.kernels.cases import draw
from tests.service.models.kernels.test_triton_modules import DTYPES, assert_close, moved

CONFIGS = [SingleRowConfig(), SingleRowConfig(outputs=4, channels=16)]


def case(num_outputs, width, dtype, *, has_bias, parts=1):
    """A row and a projection; sums are kept near one, so that types differ by rounding alone."""
    weight = draw(parts * num_outputs, width, seed=1) / width**0.5
    bias = draw(parts * num_outputs, seed=2) if has_bias else None
    projection = Projection(moved(weight, dtype), moved(bias, dtype), (num_outputs,) * parts)
    return moved(draw(1, 1, width), dtype), projection


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_outputs", "width", "has_bias"), [(5, 1030, True), (1, 7, False), (24, 2048, False)]
)
def test_one_row_is_projected(num_outputs, width, has_bias, dtype, config):
    row, projection = case(num_outputs, width, dtype, has_bias=has_bias)
    bias = None if projection.bias is None else projection.bias.double()
    expected = functional.linear(row.double(), projection.weight.double(), bias)
    assert_close(triton_single_row.linear(row, projection, config), expected.to(dtype))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("num_outputs", "width", "has_bias"), [(16, 32, False), (5, 1030, True)])
def test_one_row_is_gated(num_outputs, width, has_bias, activation, dtype, config):
    row, projection = case(num_outputs, width, dtype, has_bias=has_bias, parts=2)
    wide = Projection(
        projection.weight.float(),
        None if projection.bias is None else projection.bias.float(),
        projection.sizes,
    )
    expected = eager.gated_product(row.float(), wide, activation).to(dtype)
    assert_close(triton_single_row.gated_product(row, projection, activation, config), expected)


def test_gates_far_below_zero_close():
    projection = Projection(moved(torch.tensor([[-300.0], [2.0]]), torch.float32), None, (1, 1))
    row = moved(torch.ones(1, 1), torch.float32)
    product = triton_single_row.gated_product(row, projection, "silu").item()
    assert abs(product) < 1e-30  # and is a number, though the exponential of 300 is none


def test_several_rows_are_refused():
    row, projection = case(4, 16, torch.float32, has_bias=False)
    with pytest.raises(ValueError, match="One contiguous row of 16 channels"):
        triton_single_row.linear(row.expand(1, 2, 16), projection)


@pytest.mark.parametrize("shape", [(2, 4), (8, 1), (4, 2)])
def test_rows_that_are_as_wide_only_together_are_no_row(shape):
    projection = Projection(torch.ones(3, 8), None, (3,))
    assert not triton_single_row.is_served(torch.ones(shape), projection)
    assert triton_single_row.is_served(torch.ones(8), projection)


def test_a_row_of_another_type_is_left_to_pytorch():
    projection = Projection(torch.ones(3, 8), None, (3,))
    assert not triton_single_row.is_served(torch.ones(8, dtype=torch.float64), projection)


def test_weights_of_a_wider_matrix_are_read_by_their_stride():
    row, projection = case(6, 64, torch.float32, has_bias=False)
    expected = functional.linear(row[..., :32], projection.weight[:, :32])
    part = Projection(projection.weight[:, :32], None, (6,))
    assert_close(triton_single_row.linear(row[..., :32].contiguous(), part), expected)
