"""The eager kernel against attention written out with a mask, row by row."""

import math
from dataclasses import replace

import pytest
import torch

from sparse_methods.kernels import reference
from sparse_methods.kernels.operation import (
    AttentionInputs,
    BlockLists,
    LayerGeometry,
    PageTable,
    QueryTiles,
    Tile,
    visible_blocks,
)
from sparse_methods.kernels.reference import attend

BLOCK = 16
PLAIN = LayerGeometry(num_heads=4, num_kv_heads=2, head_dim=16, value_dim=16, scale=0.25)


def build(geometry, requests, *, peaked=1.0, seed=0):
    """A packed batch of (start, stop, prompt_len) requests on shuffled pages."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    num_pages = [-(-stop // BLOCK) for _, stop, _ in requests]
    order = torch.randperm(sum(num_pages), generator=generator)
    table = torch.zeros(len(requests), max(num_pages), dtype=torch.int64)
    tiles, row = [], 0
    for index, (start, stop, num_prompt) in enumerate(requests):
        first = sum(num_pages[:index])
        table[index, : num_pages[index]] = order[first : first + num_pages[index]]
        position = start
        while position < stop:
            is_decode = position >= num_prompt
            end = min((position // BLOCK + 1) * BLOCK, num_prompt, stop)
            end = position + 1 if is_decode else end
            tiles.append(Tile(row, end - position, position, index, is_decode))
            row += end - position
            position = end
    return AttentionInputs(
        query=draw(row, geometry.num_heads, geometry.head_dim) * peaked,
        keys=draw(sum(num_pages), BLOCK, geometry.num_kv_heads, geometry.head_dim),
        values=draw(sum(num_pages), BLOCK, geometry.num_kv_heads, geometry.value_dim),
        page_table=PageTable(table),
        tiles=QueryTiles(tuple(tiles), BLOCK, torch.device("cpu")),
        geometry=geometry,
        sinks=draw(geometry.num_heads) if geometry.has_sinks else None,
    )


def oracle(inputs, keep=None):
    """Row by row; ``keep(tile index, head, block)`` says which blocks count."""
    geometry, outputs, lses = inputs.geometry, [], []
    for index, tile in enumerate(inputs.tiles.tiles):
        table = inputs.page_table.pages[tile.request]
        keys = inputs.keys[table].flatten(0, 1)[: tile.kv_len].double()
        values = inputs.values[table].flatten(0, 1)[: tile.kv_len].double()
        for offset in range(tile.num_rows):
            position = tile.position + offset
            row_out, row_lse = [], []
            for head in range(geometry.num_heads):
                kv_head = head // geometry.group_size
                query = inputs.query[tile.first_row + offset, head].double()
                scores = keys[:, kv_head] @ query * geometry.scale
                if geometry.softcap:
                    scores = geometry.softcap * torch.tanh(scores / geometry.softcap)
                for key in range(tile.kv_len):
                    visible = key <= position
                    if geometry.window:
                        visible &= position - key < geometry.window
                    if geometry.chunk:
                        visible &= key // geometry.chunk == position // geometry.chunk
                    if not visible or (keep and not keep(index, head, key // BLOCK)):
                        scores[key] = -math.inf
                if inputs.sinks is not None:
                    scores = torch.cat([scores, inputs.sinks[head].double()[None]])
                weights = scores.softmax(-1)[: tile.kv_len]
                row_out.append(weights @ values[:, kv_head])
                row_lse.append(scores.logsumexp(-1))
            outputs.append(torch.stack(row_out))
            lses.append(torch.stack(row_lse))
    return torch.stack(outputs), torch.stack(lses)


def assert_matches(inputs, keep=None):
    result = attend(inputs)
    output, lse = oracle(inputs, keep)
    torch.testing.assert_close(result.output.double(), output, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(result.lse.double(), lse, atol=2e-5, rtol=2e-5)
    return result


MIXED = [(0, 1, 1), (0, 15, 15), (16, 33, 60), (0, 50, 50), (49, 50, 20), (30, 37, 33), (0, 17, 9)]
GEOMETRIES = {
    "plain": PLAIN,
    "mha": replace(PLAIN, num_kv_heads=4),
    "mqa": replace(PLAIN, num_kv_heads=1),
    "wide values": replace(PLAIN, value_dim=24),
    "window": replace(PLAIN, window=7),
    "window over blocks": replace(PLAIN, window=21),
    "chunk": replace(PLAIN, chunk=20),
    "softcap": replace(PLAIN, softcap=2.0),
    "sinks": replace(PLAIN, has_sinks=True),
    "all": replace(PLAIN, window=19, softcap=3.0, has_sinks=True),
}


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_dense_equals_attention_written_out(geometry):
    result = assert_matches(build(geometry, MIXED))
    assert (result.blocks[..., 1] == result.blocks[..., 0]).all()
    assert (result.blocks[..., 2] == 0).all()


def lists_of(inputs, choose, *, reverse=False):
    """Lists from ``choose(tile index, kv head, visible blocks)``."""
    first, last = (t.tolist() for t in visible_blocks(inputs.tiles, inputs.geometry))
    num_tiles, heads = len(first), inputs.geometry.num_kv_heads
    chosen = [
        [choose(t, h, list(range(first[t], last[t] + 1))) for h in range(heads)]
        for t in range(num_tiles)
    ]
    capacity = max(len(blocks or []) for row in chosen for blocks in row)
    indices = torch.full((num_tiles, heads, capacity), 999, dtype=torch.int32)
    counts = torch.full((num_tiles, heads), -1, dtype=torch.int32)
    for t, row in enumerate(chosen):
        for h, blocks in enumerate(row):
            if blocks is not None:
                order = blocks[::-1] if reverse else blocks
                indices[t, h, : len(blocks)] = torch.tensor(order, dtype=torch.int32)
                counts[t, h] = len(blocks)
    return BlockLists(indices, counts)


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_only_listed_blocks_are_read(geometry, per_head, reverse):
    inputs = build(geometry, MIXED)

    def choose(tile, head, visible):
        if tile % 5 == 4:
            return None
        kept = {visible[0], visible[-1]} | set(visible[head if per_head else 1 :: 2])
        return sorted(kept)

    inputs = replace(inputs, lists=lists_of(inputs, choose, reverse=reverse))
    kept_blocks = {}
    first, last = (t.tolist() for t in visible_blocks(inputs.tiles, geometry))
    for t in range(len(first)):
        for h in range(geometry.num_kv_heads):
            visible = list(range(first[t], last[t] + 1))
            kept_blocks[t, h] = choose(t, h, visible) or visible
    result = assert_matches(
        inputs, lambda t, head, block: block in kept_blocks[t, head // geometry.group_size]
    )
    for (t, h), blocks in kept_blocks.items():
        heads = slice(h * geometry.group_size, (h + 1) * geometry.group_size)
        assert (result.blocks[t, heads, 1] == len(blocks)).all()
        assert (result.blocks[t, heads, 0] == last[t] - first[t] + 1).all()
    if not (geometry.window or geometry.chunk):  # those see two blocks at most
        assert result.blocks[..., 1].sum() < result.blocks[..., 0].sum()


def left_to_right_rule(inputs, threshold):
    """The published rule on materialised scores, in loops: {(tile, head, block): kept}."""
    kept = {}
    geometry = inputs.geometry
    for index, tile in enumerate(inputs.tiles.tiles):
        table = inputs.page_table.pages[tile.request]
        keys = inputs.keys[table].flatten(0, 1)[: tile.kv_len]
        for head in range(geometry.num_heads):
            rows = inputs.query[tile.first_row : tile.first_row + tile.num_rows, head]
            scores = rows @ keys[:, head // geometry.group_size].T * geometry.scale
            positions = torch.arange(tile.position, tile.kv_len)[:, None]
            scores = scores.masked_fill(torch.arange(tile.kv_len) > positions, -math.inf)
            running = torch.full((tile.num_rows,), -math.inf)
            for block in range(-(-tile.kv_len // BLOCK)):
                top = scores[:, block * BLOCK : (block + 1) * BLOCK].amax(1)
                running = torch.maximum(running, top)
                kept[index, head, block] = bool((top - running > math.log(threshold)).any())
    return kept


@pytest.mark.parametrize("geometry", [PLAIN, GEOMETRIES["mqa"], GEOMETRIES["mha"]])
@pytest.mark.parametrize("threshold", [0.05, 0.5])
def test_tiles_below_the_threshold_are_skipped_per_query_head(geometry, threshold):
    inputs = build(geometry, [(0, 200, 200), (0, 130, 125), (99, 100, 64)], peaked=3.0)
    log_thresholds = torch.full((len(inputs.tiles.tiles),), math.log(threshold))
    inputs = replace(inputs, log_thresholds=log_thresholds)
    kept = left_to_right_rule(inputs, threshold)
    result = assert_matches(inputs, lambda *key: kept[key])
    for index in range(len(inputs.tiles.tiles)):
        for head in range(geometry.num_heads):
            skipped = [not k for (i, h, _), k in kept.items() if (i, h) == (index, head)]
            assert result.blocks[index, head, 2] == sum(skipped)
    assert 0 < result.blocks[..., 2].sum() < result.blocks[..., 0].sum()


@pytest.mark.parametrize("geometry", [PLAIN, GEOMETRIES["mqa"], GEOMETRIES["mha"]])
@pytest.mark.parametrize("diagonal_first", [True, False])
@pytest.mark.parametrize("has_lists", [True, False])
def test_deciding_before_reading_changes_nothing(monkeypatch, geometry, diagonal_first, has_lists):
    inputs = build(geometry, [(0, 200, 200), (32, 130, 125), (99, 150, 150)], peaked=3.0)
    num_tiles = len(inputs.tiles.tiles)
    inputs = replace(
        inputs,
        log_thresholds=torch.full((num_tiles,), math.log(0.2)),
        diagonal_first=torch.full((num_tiles,), diagonal_first),
    )
    if has_lists:
        lists = lists_of(inputs, lambda t, h, visible: visible[:1] + visible[:0:-2])
        inputs = replace(inputs, lists=lists)
    decided_first = attend(inputs)
    monkeypatch.setattr(
        reference._Reference, "_attend_skipping", reference._Reference._attend_explicit
    )
    explicit = attend(inputs)
    assert torch.equal(decided_first.blocks, explicit.blocks)
    assert torch.equal(decided_first.kv_elements, explicit.kv_elements)
    torch.testing.assert_close(decided_first.output, explicit.output, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(decided_first.lse, explicit.lse, atol=1e-5, rtol=1e-5)
    assert 0 < explicit.blocks[..., 2].sum() < explicit.blocks[..., 1].sum()


def test_a_row_of_a_batch_equals_the_row_alone():
    together = build(PLAIN, MIXED)
    result = attend(together)
    for index, tile in enumerate(together.tiles.tiles):
        alone = replace(
            together,
            query=together.query[tile.first_row : tile.first_row + tile.num_rows],
            tiles=QueryTiles((tile._replace(first_row=0),), BLOCK, torch.device("cpu")),
        )
        output = attend(alone)
        rows = slice(tile.first_row, tile.first_row + tile.num_rows)
        torch.testing.assert_close(output.output, result.output[rows], atol=1e-6, rtol=1e-6)
        assert torch.equal(output.blocks[0], result.blocks[index])


def test_slots_nobody_wrote_do_not_reach_the_output():
    inputs = build(PLAIN, [(0, 20, 20), (19, 20, 5)])
    for cache in (inputs.keys, inputs.values):
        for request in range(2):
            cache[inputs.page_table.pages[request, 1], 4:] = math.nan
    assert attend(inputs).output.isfinite().all()
    thresholds = torch.full((len(inputs.tiles.tiles),), math.log(0.1))
    assert attend(replace(inputs, log_thresholds=thresholds)).output.isfinite().all()


def test_decode_counts_the_bytes_it_reads():
    inputs = build(PLAIN, [(49, 50, 10), (0, 16, 16)])
    result = attend(inputs)
    per_key = PLAIN.num_kv_heads * (PLAIN.head_dim + PLAIN.value_dim)
    assert result.kv_elements[0].tolist() == [50 * per_key, 50 * per_key]
    assert result.kv_elements[1].tolist() == [0, 0]  # prefill is not counted
    lists = lists_of(inputs, lambda t, h, visible: visible[:1] + visible[-1:])
    result = attend(replace(inputs, lists=lists))
    num_read = BLOCK + 50 % BLOCK
    assert result.kv_elements[0].tolist() == [num_read * per_key, 50 * per_key]


def test_skipping_in_decode_saves_the_values_only():
    inputs = build(replace(PLAIN, num_kv_heads=4), [(79, 80, 10)], peaked=4.0)
    thresholds = torch.full((1,), math.log(0.5))
    result = attend(replace(inputs, log_thresholds=thresholds))
    skipped = int(result.blocks[..., 2].sum())
    assert skipped > 0
    saved = int(result.kv_elements[0, 1] - result.kv_elements[0, 0])
    assert saved == skipped * BLOCK * PLAIN.value_dim


@pytest.mark.parametrize("geometry", [PLAIN, GEOMETRIES["sinks"], GEOMETRIES["softcap"]])
def test_any_visiting_order_reads_the_listed_blocks_also_from_pages_side_by_side(geometry):
    inputs = build(geometry, [(5, 60, 60), (59, 60, 20)])  # the first begins inside of a block
    table = torch.arange(4).expand(2, 4)
    inputs = replace(inputs, page_table=PageTable(table))

    def sink_then_newest(tile, head, visible):
        return visible[:1] + visible[:0:-1][:2]

    lists = lists_of(inputs, sink_then_newest)
    inputs = replace(inputs, lists=lists)
    kept = {
        (t, block)
        for t, row in enumerate(lists.indices[:, 0].tolist())
        for block in row[: int(lists.counts[t, 0])]
    }
    result = assert_matches(inputs, lambda t, head, block: (t, block) in kept)
    assert 0 < result.blocks[..., 1].sum() < result.blocks[..., 0].sum()


def test_a_tile_without_any_visible_block_is_refused_and_not_computed():
    inputs = build(PLAIN, [(0, 20, 20)])
    lists = BlockLists(
        torch.zeros(2, 2, 1, dtype=torch.int32), torch.zeros(2, 2, dtype=torch.int32)
    )
    with pytest.raises(ValueError, match="no block"):
        attend(replace(inputs, lists=lists))
