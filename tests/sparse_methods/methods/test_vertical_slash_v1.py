import itertools
import math

import pytest
import torch

from sparse_methods import BlockSelection, InvalidKnobsError
from sparse_methods.methods.vertical_slash_v1 import VerticalSlash
from tests.sparse_methods import paged
from tests.sparse_methods.kernels.cases import DEVICE

SIZE = 16  # tokens of a block


def random_rows(num_tokens: int, num_heads: int = 4, num_kv_heads: int = 2, sharpness: float = 2.0):
    generator = torch.Generator().manual_seed(num_tokens)
    query = torch.randn(num_tokens, num_heads, 8, generator=generator) * sharpness
    return query, torch.randn(num_tokens, num_kv_heads, 8, generator=generator)


def listed(selection: BlockSelection) -> list[list[list[int]]]:
    counts = selection.counts.tolist()
    return [
        [row[: counts[tile][head]] for head, row in enumerate(heads)]
        for tile, heads in enumerate(selection.indices.tolist())
    ]


def expected(method: VerticalSlash, query, keys, tile: int, head: int) -> list[int]:
    """The rule in plain loops, for one tile and one KV head."""
    knobs, num_tokens = method.knobs, query.shape[0]
    first, recent = knobs.sink_blocks, tile + 1 - knobs.recent_blocks
    if recent <= first:
        return list(range(tile + 1))
    group = query.shape[1] // keys.shape[1]
    last = min(num_tokens, (tile + 1) * SIZE) - 1
    rows = list(range(last, tile * SIZE - 1, -knobs.row_stride))
    columns = dict.fromkeys(range(first, recent), 0.0)
    diagonals: dict[int, float] = {}
    for row in rows:
        for h in range(head * group, (head + 1) * group):
            scores = keys[: row + 1, head] @ query[row, h] / math.sqrt(query.shape[-1])
            for key, weight in enumerate(scores.softmax(0).tolist()):
                if key // SIZE in columns:
                    weight /= group * len(rows)
                    columns[key // SIZE] += weight
                    diagonals[row - key] = diagonals.get(row - key, 0.0) + weight

    def largest(mass: dict[int, float], count: int) -> list[int]:
        ranked = sorted(mass, key=lambda line: -mass[line])[:count]
        return [line for line in ranked if mass[line] > knobs.min_share]

    kept = {*range(first), *range(recent, tile + 1), *largest(columns, knobs.vertical_blocks)}
    for offset in largest(diagonals, knobs.slash_diagonals):
        for row in range(last - SIZE + 1, last + 1):
            if (row - offset) // SIZE in columns:
                kept.add((row - offset) // SIZE)
    return sorted(kept)


@pytest.mark.parametrize(
    "knobs",
    [
        {"min_share": 0.07},
        {"vertical_blocks": 2, "slash_diagonals": 0, "min_share": 0.0},
        {"vertical_blocks": 0, "slash_diagonals": 3, "min_share": 0.0},
        {"vertical_blocks": 2, "slash_diagonals": 2, "recent_blocks": 1, "sink_blocks": 2},
        {"min_share": 0.1, "row_stride": 4},
        {"min_share": 0.08, "row_stride": 1},
    ],
)
@pytest.mark.parametrize("num_tokens", [200, 197, 193])
def test_each_tile_reads_what_the_rule_says(knobs, num_tokens):
    method = VerticalSlash({"row_stride": 5, **knobs})
    query, keys = random_rows(num_tokens)
    selection = method.select_prefill(paged.prefill_view(query, keys, block_size=SIZE))
    chosen = listed(selection)
    for tile, heads in enumerate(chosen):
        for head, blocks in enumerate(heads):
            assert blocks == expected(method, query, keys, tile, head), (tile, head)
    assert sum(len(b) for heads in chosen for b in heads) < 2 * sum(range(len(chosen) + 1))


def diagonal_rows(offset: int, num_tokens: int = 256):
    """Every row looks at the key ``offset`` before it, and at nothing else."""
    codes = torch.nn.functional.one_hot(torch.arange(num_tokens), num_tokens).float()
    keys = codes[:, None] * 30.0
    return torch.roll(codes, offset, 0)[:, None] * 30.0, keys


@pytest.mark.parametrize(("offset", "extra"), [(96, [6]), (100, [5, 6]), (111, [5, 6])])
def test_a_diagonal_reads_every_block_it_crosses_though_few_rows_are_sampled(offset, extra):
    query, keys = diagonal_rows(offset)
    method = VerticalSlash({"vertical_blocks": 0, "slash_diagonals": 1, "row_stride": 8})
    chosen = listed(method.select_prefill(paged.prefill_view(query, keys, block_size=SIZE)))
    assert chosen[12][0] == [0, *extra, 11, 12]


def test_a_column_that_every_row_reads_is_found():
    keys = torch.zeros(256, 1, 8)
    keys[70] = 9.0
    method = VerticalSlash({"vertical_blocks": 1, "slash_diagonals": 0, "min_share": 0.2})
    view = paged.prefill_view(torch.ones(256, 2, 8), keys, block_size=SIZE)
    assert listed(method.select_prefill(view))[10:12] == [[[0, 4, 9, 10]], [[0, 4, 10, 11]]]


def test_heads_of_a_group_are_averaged_before_they_are_ranked():
    """One head is sure of block 3, one of block 5, and a third leans to 5 as well."""
    keys = torch.zeros(160, 1, 8)
    keys[50, 0, 0], keys[85, 0, 1] = 30.0, 30.0
    query = torch.zeros(160, 3, 8)
    query[:, 0, 0], query[:, 1, 1], query[:, 2, 1] = 30.0, 30.0, 30.0
    view = paged.prefill_view(query, keys, block_size=SIZE)
    one = VerticalSlash({"vertical_blocks": 1, "slash_diagonals": 0})
    two = VerticalSlash({"vertical_blocks": 2, "slash_diagonals": 0})
    sure = VerticalSlash({"vertical_blocks": 2, "slash_diagonals": 0, "min_share": 0.5})
    assert listed(one.select_prefill(view))[9] == [[0, 5, 8, 9]]
    assert listed(two.select_prefill(view))[9] == [[0, 3, 5, 8, 9]]
    assert listed(sure.select_prefill(view))[9] == [[0, 5, 8, 9]]


def test_rows_that_are_not_sampled_do_not_matter():
    query, keys = random_rows(160)
    method = VerticalSlash({"row_stride": 8, "min_share": 0.05})
    whole = method.select_prefill(paged.prefill_view(query, keys, block_size=SIZE))
    other = query.clone()
    other[torch.arange(160) % 8 != 7] = 50.0
    same = method.select_prefill(paged.prefill_view(other, keys, block_size=SIZE))
    assert listed(whole) == listed(same)


@pytest.mark.parametrize("cuts", [[0, 48, 197], [0, 16, 32, 160, 197]])
def test_chunks_read_what_the_whole_prompt_reads(cuts):
    query, keys = random_rows(197)
    method = VerticalSlash({"min_share": 0.05, "row_stride": 4})
    whole = listed(method.select_prefill(paged.prefill_view(query, keys, block_size=SIZE)))
    parts = []
    for start, stop in itertools.pairwise(cuts):
        view = paged.prefill_view(query, keys, start=start, stop=stop, block_size=SIZE)
        parts += listed(method.select_prefill(view))
    assert parts == whole


def test_scores_and_serving_keep_the_same_blocks_at_odd_lengths_too():
    query, keys = random_rows(1000, 2, 2, sharpness=3.0)
    method = VerticalSlash({"min_share": 0.08, "slash_diagonals": 4})
    scores = torch.einsum("qhd,khd->hqk", query, keys)[None] / math.sqrt(8)
    mask, stats = method.calculate_sparsity(scores)
    served = listed(method.select_prefill(paged.prefill_view(query, keys)))
    assert stats["total_blocks"] - stats["sparse_blocks"] == sum(
        len(blocks) for heads in served for blocks in heads
    )
    for tile, heads in enumerate(served):
        for head, blocks in enumerate(heads):
            keys_read = mask[0, head, min(999, tile * 128 + 127)].nonzero()[:, 0]
            assert sorted(set((keys_read // 128).tolist())) == blocks
    assert 0 < stats["sparse_blocks"] < stats["total_blocks"]


def density(method: VerticalSlash) -> float:
    query, keys = random_rows(320)
    counts = method.select_prefill(paged.prefill_view(query, keys, block_size=SIZE)).counts
    return int(counts.sum()) / (2 * sum(range(21)))


@pytest.mark.parametrize(
    ("knob", "less", "more"),
    [
        ("sink_blocks", 1, 4),
        ("recent_blocks", 1, 4),
        ("vertical_blocks", 1, 4),
        ("slash_diagonals", 0, 4),
        ("min_share", 0.1, 0.01),
    ],
)
def test_knobs_change_how_much_is_read(knob, less, more):
    common = {"vertical_blocks": 2, "slash_diagonals": 1, "min_share": 0.02}
    assert density(VerticalSlash({**common, knob: less})) < density(
        VerticalSlash({**common, knob: more})
    )


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("sink_blocks", 0),
        ("recent_blocks", 0),
        ("vertical_blocks", -1),
        ("slash_diagonals", 65_537),
        ("min_share", 1.5),
        ("row_stride", 0),
        ("row_stride", 129),
    ],
)
def test_knobs_have_bounds(knob, value):
    with pytest.raises(InvalidKnobsError, match=knob):
        VerticalSlash({knob: value})


def test_decisions_on_a_seeded_input_stay_what_they_are():
    method = VerticalSlash(
        {"vertical_blocks": 2, "slash_diagonals": 1, "min_share": 0.08, "row_stride": 4}
    )
    query, keys = random_rows(160)
    chosen = listed(method.select_prefill(paged.prefill_view(query, keys, block_size=SIZE)))
    assert [chosen[tile] for tile in (4, 7, 9)] == GOLDEN


GOLDEN = [
    [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]],
    [[0, 2, 5, 6, 7], [0, 2, 4, 6, 7]],
    [[0, 2, 6, 8, 9], [0, 4, 7, 8, 9]],
]


@pytest.mark.parametrize("seed", range(6))
def test_kernels_read_what_each_tile_reads_alone(seed):
    group = (1, 4, 3)[(seed + seed // 3) % 3]
    generator = torch.Generator().manual_seed(seed)
    num_tokens, size = 160 + 51 * seed, (16, 32, 64)[seed % 3]
    query, keys = (
        1.5 * torch.randn(num_tokens, n, 16, generator=generator) for n in (2 * group, 2)
    )
    view = paged.prefill_view(query, keys, block_size=size, start=seed % 2 * 4 * size)
    method = VerticalSlash(
        {
            "vertical_blocks": seed,
            "slash_diagonals": (0, 3, 9)[seed % 3],
            "sink_blocks": 1 + seed % 2,
            "recent_blocks": 1 + seed % 3,
            "row_stride": (16, 3, 1)[seed % 3],
            "min_share": 0.001,
        }
    )
    table = method._kept_by_kernels(paged.on(view, DEVICE)).cpu()
    alone = method.select_prefill(view)
    assert torch.equal(BlockSelection.of(table).counts, alone.counts)
    assert torch.equal(BlockSelection.of(table).indices, alone.indices)
