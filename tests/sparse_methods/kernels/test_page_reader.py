"""Keys and values by position, wherever their pages lie."""

import pytest
import torch

from sparse_methods.kernels.operation import LayerGeometry
from sparse_methods.kernels.page_reader import PageReader
from tests.sparse_methods.kernels.cases import build

GEOMETRY = LayerGeometry(num_heads=4, num_kv_heads=2, head_dim=8, value_dim=8, scale=1.0)


@pytest.mark.parametrize("is_shuffled", [True, False])
@pytest.mark.parametrize(
    ("start", "stop", "listed"), [(0, 70, None), (20, 50, None), (0, 70, [1, 4])]
)
def test_positions_are_read_in_order(is_shuffled, start, stop, listed):
    inputs = build(GEOMETRY, [(0, 40), (0, 70)])
    if not is_shuffled:
        inputs.page_table.pages[1] = torch.arange(inputs.page_table.pages.shape[1])
    tile, heads = inputs.tiles.tiles[-1], slice(1, 2)
    keys, values = PageReader(inputs).range(tile, listed, heads, stop, start)
    positions = [p for p in range(start, stop) if listed is None or p // 16 in listed]
    pages = inputs.page_table.pages[1]
    for found, cache in ((keys, inputs.keys), (values, inputs.values)):
        expected = torch.stack([cache[pages[p // 16], p % 16, heads] for p in positions], 1)
        assert torch.equal(found, expected)


def test_side_by_side_pages_are_not_copied():
    inputs = build(GEOMETRY, [(0, 64)])
    inputs.page_table.pages[0] = torch.arange(4)
    keys = PageReader(inputs).keys(0, 60)
    assert keys.shape == (2, 60, 8)
    assert keys.untyped_storage().data_ptr() == inputs.keys.untyped_storage().data_ptr()


def test_no_block_before_a_position_is_no_key():
    inputs = build(GEOMETRY, [(0, 64)])
    keys, values = PageReader(inputs).range(inputs.tiles.tiles[2], [2], slice(0, 1), 32)
    assert keys.shape[1] == values.shape[1] == 0
