"""Gated products by the library quack against the eager ones, on a device that it serves."""

import importlib.util

import pytest
import torch

from service.models.kernels import eager, pick_module_kernels, triton_modules
from service.models.kernels.operations import Projection

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("quack") is None, reason="needs the library quack"),
    pytest.mark.timeout(300),
    # The library and its compiler warn of themselves.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),
]


def test_it_is_the_first_choice():
    from service.models.kernels import quack_modules

    device = torch.device("cuda", torch.cuda.current_device())
    assert list(pick_module_kernels(device)) == [quack_modules, triton_modules]


@pytest.fixture(autouse=True)
def _few_rows_too(monkeypatch):
    from service.models.kernels import quack_modules

    monkeypatch.setattr(quack_modules, "LEAST_ROWS", 1024)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("num_rows", "width", "inner"), [(1024, 256, 128), (1537, 1376, 512)])
def test_products_of_many_rows(monkeypatch, num_rows, width, inner, activation, dtype):
    from service.models.kernels import quack_modules

    rows = torch.randn(1, num_rows, inner, device="cuda", dtype=dtype)
    weight = (torch.randn(2 * width, inner, device="cuda") / inner**0.5).to(dtype)
    projection = Projection(weight, None, (width, width))
    wide = Projection(weight.float(), None, (width, width))
    expected = eager.gated_product(rows.float(), wide, activation).to(dtype)
    monkeypatch.delattr(triton_modules, "gated_product")  # nothing falls back unseen
    actual = quack_modules.gated_product(rows, projection, activation)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_few_rows_and_biases_are_computed_without_it():
    from service.models.kernels import quack_modules

    rows = torch.randn(1, 1100, 64, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(64, 64, device="cuda", dtype=torch.bfloat16)
    biased = Projection(weight, weight[0].clone(), (32, 32))
    plain = Projection(weight, None, (32, 32))
    for some, projection in ((rows, biased), (rows[:, :5].contiguous(), plain)):
        actual = quack_modules.gated_product(some, projection, "silu")
        assert torch.equal(actual, triton_modules.gated_product(some, projection, "silu"))
