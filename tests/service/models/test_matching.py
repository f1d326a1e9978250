import pytest
import torch
from torch import nn

from service.models.matching import mismatch, replaced_forward
from service.models.recording import Call


def linear(dtype=torch.float32):
    module = nn.Linear(64, 48, bias=False).requires_grad_(requires_grad=False)
    noise = torch.randn(48, 64, generator=torch.Generator().manual_seed(3)) / 8
    module.weight.data = noise.to(dtype)
    return module, Call((torch.zeros(1, 24, 64, dtype=dtype),), {}, None)


def alone(output):
    return (output,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_module_matches_itself(dtype):
    module, call = linear(dtype)
    assert mismatch(module, module.forward, call, alone) is None


def test_float32_may_differ_by_a_hundred_thousandth():
    module, call = linear()
    assert mismatch(module, lambda x: module(x) * (1 + 5e-6), call, alone) is None
    found = mismatch(module, lambda x: module(x) * (1 + 2e-5), call, alone)
    assert found is not None
    assert found.startswith("differs by 2e-05 of its size, 1e-05 is allowed")


def test_low_precision_may_not_err_much_more_than_the_original():
    module, call = linear(torch.bfloat16)

    def rounded_again(rows):
        return (module(rows).float() * 1.01).bfloat16()

    def exact(rows):
        return (rows.float() @ module.weight.float().T).bfloat16()

    assert mismatch(module, exact, call, alone) is None
    assert "differs by" in (mismatch(module, rounded_again, call, alone) or "")


@pytest.mark.parametrize(
    ("fused", "sentence"),
    [
        (lambda x: x[..., :4], r"gives (1, 24, 4) for (1, 24, 48)"),
        (lambda x: x[..., :48] * float("nan"), "differs by nan"),
        (lambda x: [][0], "fails with IndexError: list index out of range"),
    ],
)
def test_what_is_no_answer_is_said(fused, sentence):
    module, call = linear()
    assert sentence in (mismatch(module, fused, call, alone) or "")


def test_a_bound_that_only_large_numbers_reach_is_noticed():
    module, call = linear()
    bounded = nn.Sequential(module, nn.Hardtanh(-8.0, 8.0))
    assert mismatch(bounded, bounded.forward, call, alone) is None
    assert "differs by" in (mismatch(bounded, module.forward, call, alone) or "")


def test_a_call_without_hidden_states_cannot_be_compared():
    module, _ = linear()
    call = Call((), {"other": 1}, None)
    assert mismatch(module, module.forward, call, alone) == "gets no hidden states"


def test_a_forward_comes_back_as_it_was():
    module, call = linear()
    own = nn.Identity()
    own.forward = module.forward  # type: ignore[method-assign]
    with replaced_forward({module: lambda x: x + 1, own: lambda x: x + 2}):
        assert torch.equal(module(torch.zeros(1)), torch.ones(1))
        assert torch.equal(own(torch.zeros(1)), torch.full((1,), 2.0))
    assert "forward" not in vars(module)
    assert torch.equal(own(call.rows), module(call.rows))
