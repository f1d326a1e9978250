"""Shares of attention that kernels estimate against the eager ones of the methods."""

from dataclasses import replace

import pytest
import torch

from sparse_methods.kernels import selection, triton_estimates
from sparse_methods.methods import flashprefill_v1, xattention_v1
from tests.sparse_methods import paged
from tests.sparse_methods.kernels.cases import DEVICE

HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16  # as the interpreter allows
CASES = {  # tokens, heads, KV heads, head dim, block size, where a chunk starts and stops, dtype
    "mha": (300, 2, 2, 16, 64, 0, None, torch.float32),
    "groups of 3": (161, 3, 1, 64, 32, 0, None, torch.float32),
    "groups of 4": (100, 4, 1, 96, 32, 64, None, torch.float32),
    "groups of 8": (90, 8, 1, 128, 32, 32, None, torch.float32),
    "half": (200, 4, 2, 128, 64, 0, 128, HALF),
    "one tile": (128, 2, 1, 16, 128, 0, None, torch.float32),
    "one row": (1, 2, 1, 16, 128, 0, None, torch.float32),
    "a row in a later tile": (257, 2, 1, 16, 128, 128, None, torch.float32),
}


@pytest.fixture(autouse=True)
def _eager(monkeypatch):
    """What is compared with, on any device."""
    monkeypatch.setattr(selection, "has_kernels", lambda tensor: False)


def prompt(num_tokens, heads, kv_heads, head_dim, block_size, start, stop, dtype):
    generator = torch.Generator().manual_seed(0)
    draw = lambda count: torch.randn(num_tokens, count, head_dim, generator=generator)  # noqa: E731
    query, keys = 2 * draw(heads).to(dtype), 2 * draw(kv_heads).to(dtype)
    view = paged.prefill_view(query, keys, block_size=block_size, start=start, stop=stop)
    return paged.on(view, DEVICE)


def assert_same_shares(given, expected, dtype):
    tolerance = 2e-5 if dtype == torch.float32 else 2e-4
    torch.testing.assert_close(given, expected, rtol=20 * tolerance, atol=tolerance)
    assert not given.isnan().any()


@pytest.mark.parametrize("case", CASES)
def test_mean_keys_give_every_row_of_a_tile_a_say(case):
    view = prompt(*CASES[case])
    given = triton_estimates.mean_key_shares(view, view.block_means())
    expected = flashprefill_v1._shares(view, view.block_means())
    assert_same_shares(given, expected, view.query.dtype)


@pytest.mark.parametrize("stride", [4, 16])
@pytest.mark.parametrize("case", CASES)
def test_antidiagonals_give_the_mass_of_a_block(case, stride):
    view = prompt(*CASES[case])
    assert triton_estimates.can_estimate_antidiagonals(view, stride)
    given = triton_estimates.antidiagonal_shares(view, stride)
    assert_same_shares(given, xattention_v1._estimate_mass(view, stride), view.query.dtype)


@pytest.mark.parametrize(("stride", "block_size"), [(5, 20), (3, 48), (64, 64)])
def test_a_stride_need_not_be_even_nor_smaller_than_the_block(stride, block_size):
    view = prompt(75, 2, 1, 16, block_size, 0, None, torch.float32)
    assert triton_estimates.can_estimate_antidiagonals(view, stride)
    given = triton_estimates.antidiagonal_shares(view, stride)
    assert_same_shares(given, xattention_v1._estimate_mass(view, stride), torch.float32)


def test_what_kernels_cannot_estimate_is_known():
    view = prompt(75, 2, 1, 16, 48, 0, None, torch.float32)
    assert not triton_estimates.can_estimate_antidiagonals(view, 4)  # twelve cells
    wide = replace(view, query=torch.empty(75, 2, 512, device=DEVICE), block_size=128)
    assert not triton_estimates.can_share_by_mean_keys(wide)


def test_a_slab_of_tiles_at_a_time_gives_the_same(monkeypatch):
    view = prompt(300, 2, 1, 16, 32, 0, None, torch.float32)
    whole = triton_estimates.antidiagonal_shares(view, 16)
    monkeypatch.setattr(triton_estimates, "_MAX_HELD", 3 * 4 * 10)
    assert torch.equal(triton_estimates.antidiagonal_shares(view, 16), whole)


def test_a_chunk_is_estimated_as_in_the_whole_prompt_to_the_last_bit():
    whole, part = (
        prompt(300, 2, 1, 16, 32, start, stop, torch.float32)
        for start, stop in ((0, 300), (128, 256))
    )
    shares = [triton_estimates.mean_key_shares(view, view.block_means()) for view in (whole, part)]
    assert torch.equal(shares[0][:, 4:8, :8], shares[1])
    shares = [triton_estimates.antidiagonal_shares(view, 16) for view in (whole, part)]
    if DEVICE.type == "cuda":
        assert torch.equal(shares[0][:, 4:8, :8], shares[1])
    else:  # the products of the interpreter are rounded by where a row lies
        torch.testing.assert_close(shares[0][:, 4:8, :8], shares[1], rtol=1e-6, atol=1e-6)


def test_unwritten_slots_are_not_read():
    view = prompt(70, 2, 1, 16, 32, 0, None, torch.float32)
    expected = triton_estimates.antidiagonal_shares(view, 16)
    view.keys[view.pages[-1], 70 % 32 :] = float("nan")
    assert torch.equal(triton_estimates.antidiagonal_shares(view, 16), expected)
