"""The decode kernel against the eager specification, on the GPU or in Triton's interpreter."""

import math
from dataclasses import replace

import pytest
import torch

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
from sparse_methods.kernels.triton_decode import decode, default_config, most_splits
from sparse_methods.kernels.triton_workspace import Workspace

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCK = 16
PLAIN = LayerGeometry(num_heads=8, num_kv_heads=2, head_dim=64, value_dim=64, scale=0.125)
LENGTHS = [1, 16, 173, 50]  # keys of each row: one, a full page, and with the splits below
SPLITS = {"split_blocks": 4, "least": 2}  # three that are full or not, two of two blocks
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16  # as the interpreter allows
TOLERANCE = {torch.float32: (2e-5, 2e-5), HALF: (8e-3, 8e-3)}


def build(geometry=PLAIN, lengths=LENGTHS, *, block=BLOCK, dtype=torch.float32, peaked=1.0):
    """One decode row per request, on shuffled pages whose unwritten slots hold NaN."""
    generator = torch.Generator().manual_seed(len(lengths))
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    num_pages = [-(-length // block) for length in lengths]
    order = torch.randperm(sum(num_pages), generator=generator)
    keys = draw(len(order), block, geometry.num_kv_heads, geometry.head_dim)
    values = draw(len(order), block, geometry.num_kv_heads, geometry.value_dim)
    table = torch.zeros(len(lengths), max(num_pages), dtype=torch.int64)
    for request, length in enumerate(lengths):
        pages = order[sum(num_pages[:request]) :][: num_pages[request]]
        table[request, : num_pages[request]] = pages
        for cache in (keys, values):
            cache[pages[-1], (length - 1) % block + 1 :] = math.nan
    tiles = [Tile(row, 1, length - 1, row, is_decode=True) for row, length in enumerate(lengths)]
    query = draw(len(lengths), geometry.num_heads, geometry.head_dim) * peaked
    return AttentionInputs(
        query=query.to(DEVICE, dtype),
        keys=keys.to(DEVICE, dtype),
        values=values.to(DEVICE, dtype),
        page_table=PageTable(table.to(DEVICE)),
        tiles=QueryTiles(tuple(tiles), block, DEVICE),
        geometry=geometry,
        sinks=draw(geometry.num_heads).to(DEVICE) if geometry.has_sinks else None,
    )


def cut(inputs, split_blocks, least):
    return replace(
        default_config(inputs),
        split_blocks=split_blocks,
        least_splits=least,
        least_scored_splits=least,
    )


def run(inputs, **splits):
    workspace = Workspace.allocate(inputs)
    for tensor in (workspace.output, workspace.lse):
        tensor.fill_(math.nan)
    decode(inputs, inputs.tiles.decode_indices, workspace, cut(inputs, **(splits or SPLITS)))
    return workspace


def assert_matches(inputs, **splits):
    """Compare with the specification, which computes in float32 from the same numbers."""
    result = run(inputs, **splits)
    wide = {name: getattr(inputs, name).float() for name in ("query", "keys", "values")}
    expected = attend(replace(inputs, **wide))
    atol, rtol = TOLERANCE[inputs.query.dtype]
    torch.testing.assert_close(result.output.float(), expected.output, atol=atol, rtol=rtol)
    torch.testing.assert_close(result.lse, expected.lse, atol=atol, rtol=rtol)
    if inputs.log_thresholds is not None:
        assert torch.equal(result.skipped.long(), expected.blocks[..., 2])
        unread = selected_elements(inputs) - expected.kv_elements[:, 0]
        assert torch.equal(result.unread_keys.sum(1) * inputs.geometry.value_dim, unread)
    return result


def selected_elements(inputs):
    return attend(replace(inputs, log_thresholds=None)).kv_elements[:, 0]


def lists_of(inputs, choose):
    """Lists from ``choose(row, kv head, visible blocks)``; None reads all of them."""
    first, last = (t.tolist() for t in visible_blocks(inputs.tiles, inputs.geometry))
    heads = range(inputs.geometry.num_kv_heads)
    rows = [
        [choose(row, head, list(range(first[row], last[row] + 1))) for head in heads]
        for row in range(len(first))
    ]
    capacity = max(len(blocks or []) for row in rows for blocks in row) + 1
    indices = torch.full((len(rows), len(heads), capacity), 9999, dtype=torch.int32)
    counts = torch.full((len(rows), len(heads)), -1, dtype=torch.int32)
    for row, chosen in enumerate(rows):
        for head, blocks in enumerate(chosen):
            if blocks is not None:
                indices[row, head, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
                counts[row, head] = len(blocks)
    return BlockLists(indices.to(DEVICE), counts.to(DEVICE))


GEOMETRIES = {
    "plain": PLAIN,
    "mha": replace(PLAIN, num_kv_heads=8),
    "mqa": replace(PLAIN, num_kv_heads=1),
    "groups of three": replace(PLAIN, num_heads=6),
    "groups of twenty": replace(PLAIN, num_heads=20, num_kv_heads=1),
    "heads of 96": replace(PLAIN, head_dim=96, value_dim=96),
    "heads of 128": replace(PLAIN, head_dim=128, value_dim=128),
    "heads of 256": replace(PLAIN, head_dim=256, value_dim=256, num_heads=2),
    "narrow values": replace(PLAIN, head_dim=96, value_dim=40),
    "window": replace(PLAIN, window=39),
    "chunk": replace(PLAIN, chunk=100),
    "softcap": replace(PLAIN, softcap=2.0),
    "sinks": replace(PLAIN, has_sinks=True),
    "all": replace(PLAIN, window=150, chunk=200, softcap=3.0, has_sinks=True),
}


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_dense_equals_the_specification(geometry):
    assert_matches(build(geometry))


@pytest.mark.parametrize(("split_blocks", "least"), [(8, 1), (8, 32), (4, 8)])
@pytest.mark.parametrize("threshold", [None, 0.3])
def test_rows_may_be_cut_in_any_way(split_blocks, least, threshold):
    inputs = build(peaked=3.0)
    if threshold is not None:
        thresholds = torch.full((len(LENGTHS),), math.log(threshold), device=DEVICE)
        inputs = replace(inputs, log_thresholds=thresholds)
    assert_matches(inputs, split_blocks=split_blocks, least=least)


@pytest.mark.parametrize("threshold", [None, 0.3])
def test_more_splits_than_are_read_at_once(threshold):
    narrow = replace(PLAIN, num_heads=2, num_kv_heads=1, head_dim=16, value_dim=16)
    inputs = build(narrow, [8 * 280 + 3, 200], block=8, peaked=0.1)
    # Flat but for one block, behind the maxima that are read at once: what follows it is skipped.
    query = inputs.query[0, 0]
    inputs.keys[inputs.page_table.pages[0, 276], :, 0] = query / query.square().sum() * 80
    if threshold is not None:
        thresholds = torch.full((2,), math.log(threshold), device=DEVICE)
        inputs = replace(inputs, log_thresholds=thresholds)
    result = assert_matches(inputs, split_blocks=4, least=1)
    assert threshold is None or result.skipped[0, 0] == 4


@pytest.mark.parametrize("split_blocks", [0, 1, 2, 6])
def test_splits_that_do_not_compile_are_refused(split_blocks):
    with pytest.raises(ValueError, match=f"power of two: {split_blocks}"):
        cut(build(), split_blocks, least=1)


def test_short_rows_are_not_left_to_few_programs():
    config = default_config(build())
    assert most_splits(8, config.split_blocks, config.least_splits) == 8
    assert most_splits(8, config.split_blocks, config.least_scored_splits) > 1


@pytest.mark.parametrize(("split_blocks", "least"), [(8, 1), (8, 5), (8, 32), (1, 3)])
def test_there_is_room_for_the_splits_of_every_row(split_blocks, least):
    most = 0
    for num_blocks in range(1, 600):
        size = min(max(num_blocks // least, 1), split_blocks)
        most = max(most, -(-num_blocks // size))
        room = most_splits(num_blocks, split_blocks, least)
        assert most <= room
        assert most == room or num_blocks < 2 * split_blocks * least


@pytest.mark.parametrize("block", [8, 24, 128, 136, 256])
def test_blocks_of_any_size_are_read_whole(block):
    assert_matches(build(block=block, lengths=[260, 5, block + 1]))


def test_half_precision_equals_the_specification():
    assert_matches(build(dtype=HALF))


@pytest.mark.parametrize("name", ["plain", "mha", "window", "all"])
def test_lists_are_read_in_any_order_and_per_head(name):
    inputs = build(GEOMETRIES[name])

    def choose(row, head, visible):
        if row == 3:
            return None
        kept = sorted({visible[0], visible[-1], *visible[head % 2 :: 2]})
        return kept[::-1] if head % 2 else kept[1:] + kept[:1]

    assert_matches(replace(inputs, lists=lists_of(inputs, choose)))


def test_listed_blocks_that_a_window_hides_are_passed_over():
    inputs = build(replace(PLAIN, window=39))
    everything = torch.arange(21, dtype=torch.int32, device=DEVICE).expand(4, 2, 21).contiguous()
    counts = torch.tensor([1, 1, 11, 4], device=DEVICE).int()[:, None].expand(4, 2).contiguous()
    thresholds = torch.full((4,), math.log(0.5), device=DEVICE)
    inputs = replace(inputs, lists=BlockLists(everything, counts))
    assert_matches(inputs)
    assert_matches(replace(inputs, log_thresholds=thresholds))


@pytest.mark.parametrize("name", ["plain", "mha", "mqa", "groups of three", "all"])
@pytest.mark.parametrize("diagonal_first", [False, True])
def test_blocks_below_the_threshold_are_skipped_and_counted(name, diagonal_first):
    inputs = build(GEOMETRIES[name], peaked=3.0)
    thresholds = torch.tensor([0.5, 0.5, 0.9 if name == "all" else 0.2, 0.0]).log()
    order = torch.tensor([True, True, True, False]) & diagonal_first
    inputs = replace(inputs, log_thresholds=thresholds.to(DEVICE), diagonal_first=order.to(DEVICE))
    result = assert_matches(inputs)
    assert result.skipped.sum() > 0
    assert (result.skipped[3] == 0).all()


@pytest.mark.parametrize("block", [16, 136])
def test_keys_of_skipped_blocks_count_as_unread_if_no_head_needs_them(block):
    inputs = build(replace(PLAIN, num_kv_heads=4), [300, 150], block=block, peaked=4.0)
    thresholds = torch.full((2,), math.log(0.5), device=DEVICE)
    result = assert_matches(replace(inputs, log_thresholds=thresholds))
    assert result.unread_keys[0].sum() > 0


def test_thresholds_follow_the_order_of_the_lists():
    inputs = build(peaked=3.0)
    forwards = lists_of(inputs, lambda row, head, visible: visible)
    backwards = lists_of(inputs, lambda row, head, visible: visible[::-1])
    thresholds = torch.full((len(LENGTHS),), math.log(0.3), device=DEVICE)
    inputs = replace(inputs, log_thresholds=thresholds)
    results = [assert_matches(replace(inputs, lists=lists)) for lists in (forwards, backwards)]
    assert not torch.equal(results[0].skipped, results[1].skipped)


def test_lists_override_the_diagonal_first():
    inputs = build(peaked=3.0)
    lists = lists_of(inputs, lambda row, head, visible: None if row == 3 else visible)
    assert_matches(
        replace(
            inputs,
            lists=lists,
            log_thresholds=torch.full((len(LENGTHS),), math.log(0.3), device=DEVICE),
            diagonal_first=torch.ones(len(LENGTHS), dtype=torch.bool, device=DEVICE),
        )
    )


@pytest.mark.parametrize("threshold", [None, 0.3])
def test_a_row_of_a_batch_equals_the_row_alone_bit_for_bit(threshold):
    together = build(peaked=2.0)
    if threshold is not None:
        thresholds = torch.full((len(LENGTHS),), math.log(threshold), device=DEVICE)
        together = replace(together, log_thresholds=thresholds)
    result = run(together)
    for row, tile in enumerate(together.tiles.tiles):
        alone = run(
            replace(
                together,
                query=together.query[row : row + 1],
                tiles=QueryTiles((tile._replace(first_row=0),), BLOCK, DEVICE),
                log_thresholds=None if threshold is None else together.log_thresholds[:1],
            )
        )
        assert torch.equal(alone.output[0], result.output[row])
        assert torch.equal(alone.lse[0], result.lse[row])


def test_only_the_rows_asked_for_are_written():
    inputs = build()
    workspace = Workspace.allocate(inputs)
    workspace.output.fill_(7.0)
    decode(inputs, torch.tensor([3, 2], dtype=torch.int32, device=DEVICE), workspace)
    expected = attend(inputs).output
    torch.testing.assert_close(workspace.output[[2, 3]], expected[[2, 3]], atol=2e-5, rtol=2e-5)
    assert (workspace.output[[0, 1]] == 7.0).all()
    decode(inputs, torch.zeros(0, dtype=torch.int32, device=DEVICE), workspace)


def test_queries_may_lie_with_heads_before_rows():
    inputs = build()
    strided = inputs.query.transpose(0, 1).contiguous().transpose(0, 1)
    assert_matches(replace(inputs, query=strided))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a CUDA device")
def test_a_graph_runs_with_other_positions():
    inputs = build(lengths=[333] * 3, peaked=2.0)
    positions = torch.tensor([332, 332, 332], device=DEVICE)
    tiles = QueryTiles.of_rows(inputs.tiles.tiles, BLOCK, positions)
    inputs = replace(
        inputs, tiles=tiles, log_thresholds=torch.full((3,), math.log(0.3), device=DEVICE)
    )
    run(inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(inputs)
    tiles.table[:, 2] = torch.tensor([10, 200, 331], device=DEVICE)
    graph.replay()
    rows = tuple(Tile(i, 1, p, i, is_decode=True) for i, p in enumerate([10, 200, 331]))
    expected = run(replace(inputs, tiles=QueryTiles(rows, BLOCK, DEVICE)))
    assert torch.equal(captured.output, expected.output)
    assert torch.equal(captured.skipped, expected.skipped)
