"""The Triton kernel of prompt tiles against the eager one; on CPUs under Triton's interpreter."""

import math
from dataclasses import replace

import pytest
import torch

from sparse_methods.kernels import reference, triton_attention, triton_prefill
from sparse_methods.kernels.operation import LayerGeometry, QueryTiles, visible_blocks
from sparse_methods.kernels.physical_pages import clear_tails
from sparse_methods.kernels.triton_prefill import PrefillConfig
from sparse_methods.kernels.triton_workspace import Workspace
from tests.sparse_methods.kernels.cases import DEVICE, build, cut, lists_of, on_float32

PLAIN = LayerGeometry(num_heads=2, num_kv_heads=1, head_dim=16, value_dim=16, scale=0.25)
TWO_KV = replace(PLAIN, num_kv_heads=2)
ODD = [(0, 37), (19, 50)]  # chunks that start and end within a block
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16  # as the interpreter allows
TOLERANCES = {
    torch.float32: (2e-5, 2e-5),
    torch.float16: (2e-3, 2e-3),
    torch.bfloat16: (2e-2, 2e-2),
}


def assert_matches(inputs, result=None):
    result = result or triton_attention.attend(inputs)
    expected = reference.attend(on_float32(inputs))
    atol, rtol = TOLERANCES[inputs.query.dtype]
    output = result.output.float()
    torch.testing.assert_close(output, expected.output, atol=atol, rtol=rtol)
    torch.testing.assert_close(result.lse, expected.lse, atol=atol, rtol=rtol)
    assert torch.equal(result.blocks, expected.blocks)
    assert torch.equal(result.kv_elements, expected.kv_elements)
    return result


# Shape of heads, requests, block size, dtype -----------------------------------------------------

SHAPES = {  # heads, KV heads, head dim, value dim, block size, chunks of requests
    "head dim 64": (2, 1, 64, 64, 16, [(0, 33)]),
    "head dim 96": (1, 1, 96, 96, 16, [(0, 33)]),
    "head dim 128": (2, 2, 128, 128, 32, [(0, 40)]),
    "head dim 256": (1, 1, 256, 256, 16, [(0, 20)]),
    "narrow values": (1, 1, 96, 64, 16, [(0, 18)]),
    "wide values": (2, 1, 16, 24, 16, [(0, 20)]),
    "mha": (3, 3, 16, 16, 16, ODD),
    "groups of 3": (6, 2, 16, 16, 16, ODD),
    "groups of 4": (4, 1, 16, 16, 16, ODD),
    "groups of 8": (8, 1, 16, 16, 16, [(5, 19)]),
    "one row": (2, 1, 16, 16, 16, [(0, 1), (32, 33)]),
    "block of 64": (1, 1, 16, 16, 64, [(0, 100), (70, 129)]),
    "block of 256": (1, 1, 16, 16, 256, [(0, 300)]),
}
DTYPES = [torch.float32] if DEVICE.type == "cpu" else [torch.float32, HALF]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_dense(shape, dtype):
    heads, kv_heads, head_dim, value_dim, block_size, requests = shape
    geometry = LayerGeometry(heads, kv_heads, head_dim, value_dim, scale=head_dim**-0.5)
    assert_matches(build(geometry, requests, block_size, dtype))


def test_half_precision_under_the_interpreter_too():
    assert_matches(build(replace(PLAIN, head_dim=32, value_dim=32), ODD, dtype=HALF))


def test_strided_rows_and_keys():
    inputs = build(TWO_KV, ODD)
    packed = torch.cat([inputs.query, inputs.query], 1)[:, :2]  # as cut from a fused projection
    both = torch.cat([inputs.keys, inputs.values], -1)
    keys, values = both[..., :16], both[..., 16:]
    assert not any(tensor.is_contiguous() for tensor in (packed, keys, values))
    assert_matches(replace(inputs, query=packed, keys=keys, values=values))


# What a row sees ---------------------------------------------------------------------------------

GEOMETRIES = {
    "window in a block": replace(PLAIN, window=7),
    "window over blocks": replace(PLAIN, window=37),
    "window of whole blocks": replace(PLAIN, window=32),
    "chunk": replace(PLAIN, chunk=20),
    "window and chunk": replace(PLAIN, window=21, chunk=32),
    "softcap": replace(PLAIN, softcap=2.0),
    "sinks": replace(PLAIN, has_sinks=True),
    "all": replace(PLAIN, window=19, softcap=3.0, has_sinks=True),
}


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_geometry(geometry):
    assert_matches(build(geometry, [(0, 53), (50, 61)]))


def test_large_scores_neither_overflow_nor_lose_the_softcap():
    inputs = build(replace(PLAIN, softcap=50.0), ODD)
    assert_matches(replace(inputs, query=inputs.query * 300))


# Lists -------------------------------------------------------------------------------------------


def every_other(tile, head, visible):
    if tile % 4 == 3:
        return None
    return sorted({visible[0], visible[-1], *visible[head::2]})


LISTS = {
    "ascending": every_other,
    "descending": lambda t, h, visible: (every_other(t, h, visible) or visible)[::-1],
    "own block in the middle": lambda t, h, visible: visible[:1] + visible[:0:-1][:2],
    "own block missing": lambda t, h, visible: visible[: max(1, len(visible) - 1)],
    "hidden entries": lambda t, h, visible: [97, *visible[:1], 98, *visible[1:][-1:], 99],
}


@pytest.mark.parametrize("geometry", [TWO_KV, replace(TWO_KV, window=41)], ids=["plain", "window"])
@pytest.mark.parametrize("choose", LISTS.values(), ids=LISTS)
def test_only_listed_blocks_are_read(geometry, choose):
    inputs = build(geometry, [(20, 70), (37, 66)])
    result = assert_matches(replace(inputs, lists=lists_of(inputs, choose)))
    if choose is every_other and not geometry.window:
        assert (result.blocks[:, 0] != result.blocks[:, 1]).any()  # heads differ
        assert result.blocks[..., 1].sum() < result.blocks[..., 0].sum()


def test_a_list_before_what_the_window_shows_is_ignored():
    inputs = build(replace(PLAIN, window=20), [(0, 90)])
    first, _ = visible_blocks(inputs.tiles, inputs.geometry)
    assert first.max() > 0
    lists = lists_of(inputs, lambda t, h, visible: [0, *visible] if visible[0] else visible)
    assert_matches(replace(inputs, lists=lists))


# Thresholds --------------------------------------------------------------------------------------


def with_thresholds(geometry, requests, thresholds):
    """Thresholds cycle over the tiles; every second page is faint, far from any threshold."""
    inputs = build(geometry, requests)
    inputs.keys[::2] *= 0.01
    count = len(inputs.tiles.tiles)
    logs = [math.log(value) if value else -math.inf for value in thresholds]
    cycled = torch.tensor((logs * count)[:count], device=DEVICE)
    return replace(inputs, query=inputs.query * 6.0, log_thresholds=cycled)


THRESHOLD_CASES = {
    "plain": PLAIN,
    "two KV heads": TWO_KV,
    "window": replace(PLAIN, window=45),
    "sinks": replace(PLAIN, has_sinks=True),
    "softcap": replace(PLAIN, softcap=20.0),
}


@pytest.mark.parametrize("geometry", THRESHOLD_CASES.values(), ids=THRESHOLD_CASES)
@pytest.mark.parametrize("is_diagonal_first", [False, True])
@pytest.mark.parametrize("in_pairs", [False, True])
def test_blocks_below_the_threshold_are_skipped(geometry, is_diagonal_first, in_pairs):
    inputs = with_thresholds(geometry, [(0, 84), (70, 90)], [0.5, 0.02, 0.5, 0.0])
    if is_diagonal_first:  # of every third tile not: both orders in one launch
        order = torch.arange(len(inputs.tiles.tiles), device=DEVICE) % 3 != 2
        inputs = replace(inputs, diagonal_first=order)
    result = assert_matches(inputs)
    assert 0 < result.blocks[..., 2].sum() < result.blocks[..., 0].sum()
    workspace = attend_with(inputs, PrefillConfig(in_pairs=in_pairs))
    assert torch.equal(workspace.skipped, result.blocks[..., 2].int())
    torch.testing.assert_close(workspace.output, result.output)
    assert (result.blocks[3::4, :, 2] == 0).all()  # a threshold of zero is off


@pytest.mark.parametrize("in_pairs", [False, True])
@pytest.mark.parametrize("use_tma", [False, True])
def test_lists_and_thresholds_together(use_tma, in_pairs):
    inputs = with_thresholds(TWO_KV, [(0, 90)], [0.5])
    diagonal_first = torch.ones(len(inputs.tiles.tiles), dtype=torch.bool, device=DEVICE)
    lists = lists_of(inputs, lambda t, h, visible: [97, *visible[h:], *visible[:h], 99])
    inputs = replace(inputs, lists=lists, diagonal_first=diagonal_first)  # lists override
    clear_tails(inputs)
    result = attend_with(inputs, PrefillConfig(use_tma=use_tma, in_pairs=in_pairs))
    expected = assert_matches(inputs)
    assert torch.equal(result.skipped, expected.blocks[..., 2].int())
    torch.testing.assert_close(result.output, expected.output)
    assert result.skipped.sum() > 0


# How it is compiled and launched -----------------------------------------------------------------


def attend_with(inputs, config):
    workspace = Workspace.allocate(inputs)
    triton_prefill.prefill(inputs, inputs.tiles.prefill_indices, workspace, config)
    return workspace


CONFIGS = {
    "halves": PrefillConfig(sub_tile=16),
    "one loop": PrefillConfig(sub_tile=32, split_loops=False),
    "one loop of halves": PrefillConfig(sub_tile=16, split_loops=False),
    "tma": PrefillConfig(sub_tile=32, use_tma=True),
    "tma of halves": PrefillConfig(sub_tile=16, use_tma=True),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("window", [0, 29])
@pytest.mark.parametrize("is_listed", [False, True])
def test_every_configuration_computes_the_same(config, window, is_listed):
    inputs = build(replace(TWO_KV, window=window), [(37, 70)], 32, junk=1e4)
    if is_listed:
        inputs = replace(inputs, lists=lists_of(inputs, every_other))
    result = attend_with(inputs, config)
    expected = reference.attend(inputs)
    torch.testing.assert_close(result.output, expected.output, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(result.lse, expected.lse, atol=2e-5, rtol=2e-5)


def test_a_tile_of_a_batch_equals_the_tile_alone():
    together = with_thresholds(TWO_KV, ODD, [0.3])
    together = replace(together, lists=lists_of(together, every_other))
    result = attend_with(together, None)
    for index, tile in enumerate(together.tiles.tiles):
        rows = slice(tile.first_row, tile.first_row + tile.num_rows)
        indices, counts = together.lists.indices, together.lists.counts
        alone = replace(
            together,
            query=together.query[rows],
            tiles=QueryTiles((tile._replace(first_row=0),), 16, DEVICE),
            lists=replace(
                together.lists,
                indices=indices[index : index + 1],
                counts=counts[index : index + 1],
            ),
            log_thresholds=together.log_thresholds[index : index + 1],
        )
        output = attend_with(alone, None)
        assert torch.equal(output.output, result.output[rows])
        assert torch.equal(output.lse, result.lse[rows])
        assert torch.equal(output.skipped[0], result.skipped[index])


def test_heads_are_cut_into_sections_when_the_cache_of_all_is_too_large(monkeypatch):
    inputs = build(replace(PLAIN, num_heads=6, num_kv_heads=6), ODD)
    per_head = 50 * 2 * 16 * 4  # longest request, keys and values, 16 channels, 4 bytes
    monkeypatch.setattr(triton_prefill, "_L2_BYTES", 4 * per_head)  # 4 does not divide 6
    assert_matches(inputs)


def test_tiles_start_with_the_most_keys_and_those_of_decode_rows_apart():
    tiles = cut([(0, 40), (90, 96)], 16)
    decode = tiles.tiles[0]._replace(position=7, num_rows=1, is_decode=True)
    mixed = replace(tiles, tiles=(decode, *tiles.tiles))
    assert mixed.decode_indices.tolist() == [0]
    assert mixed.prefill_indices.tolist() == [4, 3, 2, 1]
    assert mixed.table.tolist()[4] == [40, 6, 90, 1]
    assert mixed.max_kv_len == 96
