"""Means of rows and keys against the eager ones."""

import pytest
import torch

from sparse_methods.kernels import selection, triton_means
from tests.sparse_methods import paged
from tests.sparse_methods.kernels.cases import DEVICE

HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16  # as the interpreter allows


@pytest.fixture(autouse=True)
def _eager(monkeypatch):
    """What is compared with, on any device."""
    monkeypatch.setattr(selection, "has_kernels", lambda tensor: False)


def prompt(num_tokens, heads=2, kv_heads=2, head_dim=16, dtype=torch.float32, **where):
    generator = torch.Generator().manual_seed(0)
    query, keys = (
        torch.randn(num_tokens, count, head_dim, generator=generator).to(dtype)
        for count in (heads, kv_heads)
    )
    return paged.on(paged.prefill_view(query, keys, **where), DEVICE)


CASES = [
    prompt(150, heads=2, kv_heads=1, block_size=64),
    prompt(128, heads=3, kv_heads=3, head_dim=64, block_size=32),
    prompt(97, heads=6, kv_heads=2, head_dim=96, block_size=48, start=48),
    prompt(100, heads=4, kv_heads=1, head_dim=128, dtype=HALF, start=32, stop=64, block_size=32),
    prompt(1, heads=8, kv_heads=1),
]


@pytest.mark.parametrize("view", CASES)
def test_a_tile_has_the_mean_of_its_rows(view):
    given = triton_means.tile_means(view)
    torch.testing.assert_close(given, view.tile_means(), rtol=1e-5, atol=1e-6)
    assert given.shape == (view.num_kv_heads, given.shape[1], view.num_tiles, given.shape[3])


@pytest.mark.parametrize("view", CASES)
def test_a_block_has_the_mean_of_its_keys(view):
    given = triton_means.block_means(view, view.summaries)
    torch.testing.assert_close(given, view.block_means(), rtol=1e-5, atol=1e-6)


def test_heads_may_lie_before_rows():
    view = CASES[0]
    given = triton_means.tile_means(view)
    moved = view.query.transpose(0, 1).contiguous().transpose(0, 1)
    vars(view)["query"], kept = moved, view.query
    try:
        assert torch.equal(triton_means.tile_means(view), given)
    finally:
        vars(view)["query"] = kept


def test_keys_behind_the_last_row_do_not_count_though_the_summary_holds_them():
    view = prompt(100, block_size=32)
    expected = view.block_means()
    view.summaries.total[view.pages[-1]] += 50.0
    torch.testing.assert_close(
        triton_means.block_means(view, view.summaries), expected, rtol=1e-5, atol=1e-6
    )
