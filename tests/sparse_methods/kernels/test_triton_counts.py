"""Counts of one launch against those of eager PyTorch."""

from dataclasses import replace

import pytest
import torch

from sparse_methods.kernels.operation import LayerGeometry, QueryTiles, Tile, count_selected
from sparse_methods.kernels.triton_counts import count
from sparse_methods.kernels.triton_workspace import Workspace
from tests.sparse_methods.kernels.cases import DEVICE, build, lists_of

GEOMETRY = LayerGeometry(num_heads=6, num_kv_heads=2, head_dim=16, value_dim=8, scale=0.25)
GEOMETRIES = {
    "plain": GEOMETRY,
    "window": replace(GEOMETRY, window=45),
    "chunk": replace(GEOMETRY, chunk=32),
    "mqa": replace(GEOMETRY, num_kv_heads=1),
}


def batch(geometry):
    """Prompt tiles of two requests, and the last rows of one as generated ones."""
    inputs = build(geometry, [(0, 300), (19, 90)])
    tiles = list(inputs.tiles.tiles)
    last = tiles.pop()
    tiles += [
        Tile(last.first_row + row, 1, last.position + row, last.request, is_decode=True)
        for row in range(last.num_rows)
    ]
    return replace(inputs, tiles=QueryTiles(tuple(tiles), 16, DEVICE))


def some(tile, head, visible):
    """Blocks in no order, invisible ones among them, and tiles that read all."""
    return None if tile % 4 == 1 else [999, *visible[::-2], 98][head:]


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("is_listed", [False, True])
@pytest.mark.parametrize("has_thresholds", [False, True])
def test_counts(geometry, is_listed, has_thresholds):
    inputs = batch(geometry)
    if is_listed:
        inputs = replace(inputs, lists=lists_of(inputs, some))
    if has_thresholds:
        inputs = replace(inputs, log_thresholds=torch.zeros(len(inputs.tiles.tiles), device=DEVICE))
    workspace = Workspace.allocate(inputs)
    blocks, kv_elements = (counted.clone() for counted in count_selected(inputs))
    if has_thresholds:
        workspace.skipped.random_(9)
        workspace.unread_keys[inputs.tiles.is_decode] = 7
        blocks[..., 2] = workspace.skipped
        kv_elements[:, 0] -= workspace.unread_keys.sum(1) * geometry.value_dim
    result = count(inputs, workspace)
    assert torch.equal(result[0], blocks)
    assert torch.equal(result[1], kv_elements)
    assert kv_elements[:, 1].sum() > 0


def test_lists_longer_than_what_is_counted_at_once():
    inputs = batch(GEOMETRY)
    lists = lists_of(inputs, lambda tile, head, visible: visible[tile % 2 :] + [997] * 130)
    inputs = replace(inputs, lists=lists)
    for mine, expected in zip(count(inputs), count_selected(inputs), strict=True):
        assert torch.equal(mine, expected)
