"""Lists of physical pages and clean ends, against what the tables say."""

from dataclasses import replace

import pytest
import torch

from sparse_methods.kernels.operation import (
    LayerGeometry,
    QueryTiles,
    Tile,
    count_selected,
    visible_blocks,
)
from sparse_methods.kernels.physical_pages import clear_tails, physical_lists
from tests.sparse_methods.kernels.cases import DEVICE, build, cut, lists_of

GEOMETRY = LayerGeometry(num_heads=6, num_kv_heads=2, head_dim=16, value_dim=16, scale=0.25)
REQUESTS = [(0, 37), (32, 90), (19, 50)]  # the last one begins within of a block


def some(tile, head, visible):
    """Every other block, the own one not always among them; some tiles read all."""
    return None if tile == 1 else visible[head % len(visible) :: 2]


def shuffled(tile, head, visible):
    return visible[::-1]


@pytest.mark.parametrize("choose", [some, shuffled], ids=["some", "shuffled"])
@pytest.mark.parametrize("index", [0, 1])
def test_lists_name_the_pages_of_the_blocks_before_the_tile_and_its_own(index, choose):
    inputs = build(GEOMETRY, REQUESTS)
    lists = lists_of(inputs, choose)
    inputs = type(inputs)(**{**vars(inputs), "lists": lists})
    run = inputs.tiles.runs[index]
    expected, _ = count_selected(inputs)
    blocks = torch.zeros_like(expected)
    physical = physical_lists(inputs, run, blocks)
    _, own = visible_blocks(inputs.tiles, GEOMETRY)
    row = inputs.page_table.pages[run.request].tolist()
    for place, tile in enumerate(range(run.tiles.start, run.tiles.stop)):
        for head in range(GEOMETRY.num_heads):
            kv_head = head // GEOMETRY.group_size
            count = int(lists.counts[tile, kv_head])
            listed = lists.indices[tile, kv_head, :count].tolist()
            listed = list(range(int(own[tile]) + 1)) if count < 0 else listed
            assert int(physical.own_pages[0, head, place, 0]) == row[int(own[tile])]
            assert int(physical.own_counts[0, head, place]) == (int(own[tile]) in listed)
            num_pages = int(physical.counts[0, head, place])
            assert physical.pages[0, head, place, :num_pages].tolist() == [
                row[block] for block in listed if block < own[tile]
            ]
    assert torch.equal(blocks[run.tiles, :, 1], expected[run.tiles, :, 1])


def test_long_lists_are_translated_in_parts():
    inputs = build(GEOMETRY, [(0, 16 * 300)])
    lists = lists_of(inputs, lambda tile, head, visible: visible[tile % 2 :: 1 + tile % 3])
    inputs = type(inputs)(**{**vars(inputs), "lists": lists})
    [run] = inputs.tiles.runs
    physical = physical_lists(inputs, run, torch.zeros(300, 6, 3, dtype=torch.int64, device=DEVICE))
    row = inputs.page_table.pages[0]
    for tile in (0, 255, 256, 257, 299):
        listed = lists.indices[tile, 1, : int(lists.counts[tile, 1])].long()
        before = row[listed[listed < tile]]
        assert int(physical.counts[0, 5, tile]) == len(before)
        assert torch.equal(physical.pages[0, 5, tile, : len(before)].long(), before)


def test_a_run_is_the_prompt_tiles_of_a_request_from_a_whole_block_on():
    tiles = build(GEOMETRY, REQUESTS).tiles
    found = [(run.request, run.position, run.kv_len, run.num_tiles) for run in tiles.runs]
    assert found == [(0, 0, 37, 3), (1, 32, 90, 4), (2, 32, 50, 2)]
    for run in tiles.runs:
        assert run.rows == slice(tiles.tiles[run.first_tile].first_row, run.rows.stop)
        last = tiles.tiles[run.tiles.stop - 1]
        assert run.rows.stop == last.first_row + last.num_rows


def test_tiles_beside_runs_are_the_others_in_their_order():
    tiles = build(GEOMETRY, REQUESTS).tiles
    left = tiles.prefill_indices_beside(tiles.runs[:1]).tolist()
    assert left == [index for index in tiles.prefill_indices.tolist() if index > 2]
    assert tiles.prefill_indices_beside(()) is tiles.prefill_indices


def test_values_behind_the_last_key_become_zero_and_no_others():
    inputs = build(GEOMETRY, [(0, 37), (0, 32), (19, 50)])
    before = inputs.values.clone()
    clear_tails(inputs)
    pages = inputs.page_table.pages
    for request, kv_len in ((0, 37), (2, 50)):
        page = pages[request, kv_len // 16]
        assert before[page, kv_len % 16 :].isnan().all()
        assert (inputs.values[page, kv_len % 16 :] == 0).all()
    assert torch.equal(inputs.values, before.nan_to_num(0.0))


@pytest.mark.parametrize("num_generated", [3, 11, 14])
def test_generated_values_behind_a_prompt_that_is_computed_again_stay(num_generated):
    """After preemption, a step holds the end of a prompt and the rows generated behind it."""
    num_prompt = 37
    inputs = build(GEOMETRY, [(0, num_prompt + num_generated)])
    prompt = cut([(0, num_prompt)], 16).tiles
    rows = range(num_prompt, num_prompt + num_generated)
    generated = tuple(Tile(row, 1, row, 0, is_decode=True) for row in rows)
    tiles = QueryTiles(prompt + generated, 16, inputs.query.device)
    inputs = replace(inputs, tiles=tiles)
    expected = inputs.values.nan_to_num(0.0)
    clear_tails(inputs)
    assert torch.equal(inputs.values, expected)
