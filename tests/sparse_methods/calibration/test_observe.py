"""One pass counts for every threshold what the kernel, run with it, skips."""

import pytest
import torch

from sparse_methods.calibration.observe import count_skipped, diagonal_first_order, skip_margins
from sparse_methods.kernels import reference
from sparse_methods.kernels.operation import (
    AttentionInputs,
    LayerGeometry,
    PageTable,
    QueryTiles,
    Tile,
)
from tests.sparse_methods import paged

BLOCK, DIM = 16, 8
THRESHOLDS = torch.tensor([1e-4, 0.01, 0.1, 0.5, 0.99]).log()


def inputs(geometry: LayerGeometry, *, num_tokens: int = 150, decode: bool = False):
    generator = torch.Generator().manual_seed(3)
    topics = torch.randn(20, geometry.num_kv_heads, DIM, generator=generator)
    key = topics.repeat_interleave(8, 0)[:num_tokens] * 2
    group = geometry.group_size
    noise = torch.randn(num_tokens, geometry.num_heads, DIM, generator=generator)
    query = key.repeat_interleave(group, 1) + noise
    cache, pages = paged.lay_out(key, BLOCK)
    start = num_tokens - 20 if decode else 0
    tiles, position = [], start
    while position < num_tokens:
        end = position + 1 if decode else min((position // BLOCK + 1) * BLOCK, num_tokens)
        tiles.append(Tile(position - start, end - position, position, 0, decode))
        position = end
    return AttentionInputs(
        query=query[start:],
        keys=cache,
        values=cache.clamp(max=1.0),
        page_table=PageTable(pages[None]),
        tiles=QueryTiles(tuple(tiles), BLOCK, torch.device("cpu")),
        geometry=geometry,
    )


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("diagonal_first", [False, True])
@pytest.mark.parametrize(
    "geometry",
    [
        LayerGeometry(2, 2, DIM, DIM, DIM**-0.5),
        LayerGeometry(6, 2, DIM, DIM, DIM**-0.5, softcap=5.0),
        LayerGeometry(2, 1, DIM, DIM, DIM**-0.5, window=40),
    ],
    ids=["plain", "grouped and capped", "window"],
)
def test_the_counts_are_those_of_the_kernel(geometry, diagonal_first, decode):
    one = inputs(geometry, decode=decode)
    skipped, total = count_skipped(one, THRESHOLDS, diagonal_first=diagonal_first)
    num_tiles = len(one.tiles.tiles)
    order = torch.full((num_tiles,), diagonal_first)
    for index, log_threshold in enumerate(THRESHOLDS):
        logs = torch.full((num_tiles,), float(log_threshold))
        changed = {**vars(one), "log_thresholds": logs, "diagonal_first": order}
        blocks = reference.attend(AttentionInputs(**changed)).blocks.sum(1)
        assert torch.equal(skipped[:, index], blocks[:, 2])
        assert torch.equal(total, blocks[:, 0])
    if diagonal_first:
        assert 0 < int(skipped[:, -1].sum()) < int(total.sum())
    assert (skipped.diff(dim=1) >= 0).all()


def test_the_own_block_comes_first():
    order = diagonal_first_order(torch.tensor([0, 2, 3]), 4)
    assert order.tolist() == [[0, 1, 2, 3], [2, 0, 1, 3], [3, 0, 1, 2]]


def test_a_margin_is_that_of_the_best_row():
    nothing = float("-inf")
    maxima = torch.tensor([[2.0, 1.0, 5.0, 4.0], [nothing, 3.0, 1.0, nothing]])
    assert skip_margins(maxima).tolist() == [0.0, 0.0, 0.0, -1.0]
    unseen = torch.full((2, 3), nothing)
    assert skip_margins(unseen).tolist() == [nothing] * 3
