import itertools
import math

import pytest
import torch

from sparse_methods import BlockSelection, InvalidKnobsError
from sparse_methods.methods.flexprefill_v1 import FlexPrefill
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


def num_covering(mass: list[float], share: float) -> int:
    total, reached = sum(mass), 0.0
    for count, value in enumerate(sorted(mass, reverse=True)):
        if reached >= share * total:
            return count
        reached += value
    return len(mass)


def largest(mass: list[float], count: int) -> set[int]:
    ranked = sorted(range(len(mass)), key=lambda index: -mass[index])[:count]
    return {index for index in ranked if mass[index] > 0}


def by_block(mass: list[float]) -> list[float]:
    return [sum(mass[start : start + SIZE]) for start in range(0, len(mass), SIZE)]


def distance(p: list[float], q: list[float]) -> float:
    def entropy(a: list[float], b: list[float]) -> float:
        return sum(x * math.log(2 * x / (x + y)) for x, y in zip(a, b, strict=True) if x > 0)

    return math.sqrt(max(0.0, (entropy(p, q) + entropy(q, p)) / 2))


def pooled_by_block(query, keys, rows, scores) -> list[float]:
    """Softmax of the mean scores by block; the own block counts what the sampled rows see."""
    tile = int(rows[-1]) // SIZE
    mean = query[tile * SIZE : rows[-1] + 1].mean(0)
    means = [
        float(mean @ keys[b * SIZE : (b + 1) * SIZE].mean(0)) / math.sqrt(8) for b in range(tile)
    ]
    own = [float(s) for row, line in zip(rows, scores, strict=True) for s in line[tile * SIZE :]]
    return torch.tensor([*means, sum(own) / len(own)]).softmax(0).tolist()


def expected(method: FlexPrefill, query, keys, tile: int, head: int) -> tuple[list[int], int]:
    """The rule in plain loops, for one tile and KV head; and how many heads trust pooled scores."""
    knobs, last = method.knobs, min(query.shape[0], (tile + 1) * SIZE) - 1
    rows = sorted(range(last, tile * SIZE - 1, -knobs.row_stride))
    group = query.shape[1] // keys.shape[1]
    zeros = [0.0] * (last + 1)
    columns, diagonals, total = list(zeros), list(zeros), [0.0] * (tile + 1)
    pooled_total, num_pooled = [0.0] * (tile + 1), 0
    for h in range(head * group, (head + 1) * group):
        scores = [keys[: row + 1, head] @ query[row, h] / math.sqrt(8) for row in rows]
        pooled = pooled_by_block(query[:, h], keys[:, head], rows, scores)
        mine, across = list(zeros), list(zeros)
        for row, line in zip(rows, scores, strict=True):
            for key, weight in enumerate(line.softmax(0).tolist()):
                mine[key] += weight
                across[last - (row - key)] += weight
        blocks = [value / len(rows) for value in by_block(mine)]
        total = [a + b for a, b in zip(total, blocks, strict=True)]
        if distance(pooled, blocks) < knobs.tau:
            num_pooled += 1
            pooled_total = [a + b for a, b in zip(pooled_total, pooled, strict=True)]
        else:
            columns = [a + b for a, b in zip(columns, mine, strict=True)]
            diagonals = [a + b for a, b in zip(diagonals, across, strict=True)]
    kept = {0, tile} | largest(total, knobs.min_budget_blocks)
    kept |= largest(pooled_total, num_covering(pooled_total, knobs.gamma))
    for lines in (columns, diagonals):
        kept |= largest(by_block(lines), num_covering(lines, knobs.gamma) // SIZE + 1)
    return sorted(kept), num_pooled


@pytest.mark.parametrize(
    ("knobs", "pooled"),
    [
        ({"tau": 0.0}, "none"),
        ({"tau": 1.0, "gamma": 0.6}, "all"),
        ({"tau": 0.15, "gamma": 0.5}, "some"),
        ({"tau": 0.0, "min_budget_blocks": 4, "gamma": 0.2, "row_stride": 1}, "none"),
    ],
)
@pytest.mark.parametrize("num_tokens", [160, 149, 145])
def test_each_tile_reads_what_the_rule_says(knobs, pooled, num_tokens):
    method = FlexPrefill({"row_stride": 5, "gamma": 0.7, "min_budget_blocks": 1, **knobs})
    query, keys = random_rows(num_tokens)
    chosen = listed(method.select_prefill(paged.prefill_view(query, keys, block_size=SIZE)))
    counts = []
    for tile, heads in enumerate(chosen):
        for head, blocks in enumerate(heads):
            kept, num_pooled = expected(method, query, keys, tile, head)
            assert blocks == kept, (tile, head)
            counts.append(num_pooled)
    assert sum(len(b) for heads in chosen for b in heads) < 2 * sum(range(len(chosen) + 1))
    share = sum(counts) / (2 * len(counts))
    assert {"none": share == 0, "all": share == 1, "some": 0 < share < 1}[pooled]


def sharp_group(num_tokens: int = 160):
    """Head 0 is sure of block 3, heads 1 and 2 of block 5."""
    keys = torch.zeros(num_tokens, 1, 8)
    keys[50, 0, 0], keys[85, 0, 1] = 30.0, 30.0
    query = torch.zeros(num_tokens, 3, 8)
    query[:, 0, 0], query[:, 1, 1], query[:, 2, 1] = 30.0, 30.0, 30.0
    return query, keys


@pytest.mark.parametrize(("gamma", "blocks"), [(0.6, [0, 5, 9]), (0.9, [0, 3, 5, 9])])
def test_gamma_counts_on_the_summed_attention_of_a_group(gamma, blocks):
    """Blocks, not tokens: one key per block is what keeps the counts of lines below a block."""
    method = FlexPrefill({"gamma": gamma, "tau": 1.0, "min_budget_blocks": 1})
    view = paged.prefill_view(*sharp_group(), block_size=SIZE)
    assert listed(method.select_prefill(view))[9] == [blocks]


def test_the_distance_decides_which_estimate_is_trusted():
    """Means hide a single key, so that pooled scores are far from what the rows see."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(320, 1, 8, generator=generator) * 0.01
    keys[70, 0] = 4.0
    view = paged.prefill_view(torch.ones(320, 1, 8) * 4, keys, block_size=SIZE)
    common = {"gamma": 0.6, "min_budget_blocks": 1, "row_stride": 1}
    wary = listed(FlexPrefill({**common, "tau": 0.1}).select_prefill(view))[19][0]
    trusting = listed(FlexPrefill({**common, "tau": 1.0}).select_prefill(view))[19][0]
    assert wary != trusting
    assert 4 in wary


@pytest.mark.parametrize("cuts", [[0, 48, 197], [0, 16, 32, 160, 197]])
def test_chunks_read_what_the_whole_prompt_reads(cuts):
    query, keys = random_rows(197)
    method = FlexPrefill({"row_stride": 4, "gamma": 0.6, "tau": 0.15, "min_budget_blocks": 1})
    whole = listed(method.select_prefill(paged.prefill_view(query, keys, block_size=SIZE)))
    parts = []
    for start, stop in itertools.pairwise(cuts):
        view = paged.prefill_view(query, keys, start=start, stop=stop, block_size=SIZE)
        parts += listed(method.select_prefill(view))
    assert parts == whole
    assert sum(len(b) for heads in whole for b in heads) < 2 * sum(range(len(whole) + 1))


@pytest.mark.parametrize("tau", [0.0, 0.15, 1.0])
def test_scores_and_serving_keep_the_same_blocks_at_odd_lengths_too(tau):
    query, keys = random_rows(1000, 2, 2, sharpness=3.0)
    method = FlexPrefill({"gamma": 0.4, "tau": tau, "min_budget_blocks": 1})
    scores = torch.einsum("qhd,khd->hqk", query, keys)[None] / math.sqrt(8)
    mask, stats = method.calculate_sparsity(scores)
    for tile, heads in enumerate(listed(method.select_prefill(paged.prefill_view(query, keys)))):
        for head, blocks in enumerate(heads):
            keys_read = mask[0, head, min(999, tile * 128 + 127)].nonzero()[:, 0]
            assert sorted(set((keys_read // 128).tolist())) == blocks
    assert 0 < stats["sparse_blocks"] < stats["total_blocks"]


def density(knobs) -> float:
    query, keys = random_rows(320)
    method = FlexPrefill({"tau": 0.0, "min_budget_blocks": 1, **knobs})
    counts = method.select_prefill(paged.prefill_view(query, keys, block_size=SIZE)).counts
    return int(counts.sum()) / (2 * sum(range(21)))


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"gamma": 0.2}, {"gamma": 0.8}),
        ({"gamma": 0.2, "min_budget_blocks": 1}, {"gamma": 0.2, "min_budget_blocks": 8}),
    ],
)
def test_knobs_change_how_much_is_read(less, more):
    assert density(less) < density(more) < 1


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("gamma", 0.0),
        ("gamma", 1.1),
        ("tau", -0.1),
        ("tau", 1.1),
        ("min_budget_blocks", 0),
        ("row_stride", 0),
        ("row_stride", 129),
    ],
)
def test_knobs_have_bounds(knob, value):
    with pytest.raises(InvalidKnobsError, match=knob):
        FlexPrefill({knob: value})


def test_decisions_on_a_seeded_input_stay_what_they_are():
    method = FlexPrefill({"gamma": 0.5, "tau": 0.15, "min_budget_blocks": 1, "row_stride": 4})
    query, keys = random_rows(160)
    chosen = listed(method.select_prefill(paged.prefill_view(query, keys, block_size=SIZE)))
    assert [chosen[tile] for tile in (4, 7, 9)] == GOLDEN


GOLDEN = [
    [[0, 3, 4], [0, 2, 3, 4]],
    [[0, 1, 2, 4, 5, 6, 7], [0, 3, 5, 7]],
    [[0, 2, 3, 4, 5, 6, 9], [0, 4, 7, 8, 9]],
]


@pytest.mark.parametrize("seed", range(6))
def test_kernels_read_what_each_tile_reads_alone(seed):
    group = (1, 4, 3)[(seed + seed // 3) % 3]
    generator = torch.Generator().manual_seed(seed)
    num_tokens, size = 200 + 91 * seed, (16, 32, 64)[seed % 3]
    query, keys = (
        1.5 * torch.randn(num_tokens, n, 16, generator=generator) for n in (2 * group, 2)
    )
    view = paged.prefill_view(query, keys, block_size=size, start=seed % 2 * 4 * size)
    method = FlexPrefill(
        {
            "gamma": (0.3, 0.6, 0.4)[seed % 3],
            "tau": (0.0, 0.3, 0.5)[seed // 2],
            "min_budget_blocks": 1 + seed % 2,
            "row_stride": (16, 3, 1)[seed % 3],
        }
    )
    together = BlockSelection.of(method._kept_by_kernels(paged.on(view, DEVICE)).cpu())
    alone = method.select_prefill(view)
    assert torch.equal(together.counts, alone.counts)
    assert torch.equal(together.indices, alone.indices)
    assert (alone.counts.sum(0) < view.visible.sum()).any()
