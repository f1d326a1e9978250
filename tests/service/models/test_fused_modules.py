import torch
from torch import nn

from service.models.fused_modules import FusedNorm, merge
from service.models.kernels import eager
from service.models.kernels.operations import Norm


def test_merged_layers_are_views_and_compute_what_they_did():
    layers = [nn.Linear(6, n, bias=n != 3).requires_grad_(requires_grad=False) for n in (4, 3, 2)]
    rows = torch.randn(5, 6)
    before = [layer(rows) for layer in layers]
    projection = merge(layers)
    assert projection.sizes == (4, 3, 2)
    together = nn.functional.linear(rows, projection.weight, projection.bias)
    torch.testing.assert_close(list(together.split(projection.sizes, -1)), before)
    torch.testing.assert_close([layer(rows) for layer in layers], before)
    layers[1].weight.data.zero_()
    assert not projection.weight[4:7].any()


def test_a_norm_that_was_prepared_is_taken_for_that_tensor_only_and_once():
    calls = []

    class Counting:
        add_rms_norm = staticmethod(eager.add_rms_norm)

        @staticmethod
        def rms_norm(rows, norm):
            calls.append(rows)
            return eager.rms_norm(rows, norm)

    norm = FusedNorm(Norm(torch.rand(8), 1e-6, 0.0), Counting())  # type: ignore[arg-type]
    total = norm.prepare(torch.randn(2, 8), torch.randn(2, 8))
    prepared = norm(total)
    assert not calls
    assert torch.equal(norm(total), prepared)
    assert len(calls) == 1
    norm.prepare(torch.randn(2, 8), torch.randn(2, 8))
    assert torch.equal(norm(total.clone()), prepared)
    assert len(calls) == 2
