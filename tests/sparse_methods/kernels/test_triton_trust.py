"""Which heads trust pooled scores, against the distance of ``flexprefill`` in plain torch."""

import pytest
import torch

from sparse_methods.kernels import triton_trust
from sparse_methods.methods import flexprefill_v1
from tests.sparse_methods.kernels.cases import DEVICE


def estimates(group, num_tiles, first_block, spread):
    """Pooled scores, those of the own block, and attention that is more or less like them."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, group, num_tiles, first_block + num_tiles)
    draw = lambda: torch.randn(shape, generator=generator).to(DEVICE)  # noqa: E731
    blocks = torch.arange(shape[-1], device=DEVICE)
    own = torch.arange(first_block, shape[-1], device=DEVICE)[:, None]
    scores = (3 * draw()).masked_fill(blocks > own, float("-inf"))
    mass = (scores + spread * torch.rand(shape[:3], generator=generator).to(DEVICE)[..., None]
            * draw()).softmax(-1)  # fmt: skip
    own_scores = scores.gather(-1, own.expand(2, group, -1, -1))[..., 0]
    junk = torch.where(blocks >= own, 7.0, scores)  # which the kernel must not look at
    return scores, junk, own_scores, mass


@pytest.mark.parametrize(("group", "num_tiles", "first_block"), [(1, 9, 0), (4, 5, 3), (3, 1, 16)])
@pytest.mark.parametrize("tau", [0.0, 0.1, 1.0])
def test_heads_whose_attention_is_near_are_added_up(group, num_tiles, first_block, tau):
    scores, junk, own, mass = estimates(group, num_tiles, first_block, 1.0)
    sums, is_pooled = triton_trust.trusted_mass(junk, own, mass, first_block, tau)
    shares = scores.softmax(-1)
    expected = (flexprefill_v1._distance(shares, mass) < tau)[..., None]
    assert torch.equal(is_pooled, expected)
    torch.testing.assert_close(sums, (shares * expected).sum(1), rtol=1e-5, atol=1e-6)
    if tau == 0.1 and group > 1:
        assert (0 < expected.float().mean() < 1).item()


def test_what_is_alike_has_no_distance():
    scores, junk, own, _ = estimates(2, 6, 0, 0.0)
    mass = scores.softmax(-1)
    _, is_pooled = triton_trust.trusted_mass(junk, own, mass, 0, 1e-3)
    assert is_pooled.all()


def test_a_chunk_trusts_as_the_whole_prompt_to_the_last_bit():
    _, junk, own, mass = estimates(4, 11, 0, 1.0)
    whole = triton_trust.trusted_mass(junk, own, mass, 0, 0.1)
    part = triton_trust.trusted_mass(
        junk[:, :, 4:6, :6], own[:, :, 4:6], mass[:, :, 4:6, :6], 4, 0.1
    )
    assert torch.equal(whole[0][:, 4:6, :6], part[0])
    assert torch.equal(whole[1][:, :, 4:6], part[1])
