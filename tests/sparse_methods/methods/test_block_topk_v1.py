import math
from typing import Any

import pytest
import torch

from sparse_methods import InvalidKnobsError
from sparse_methods.methods.block_topk_v1 import BlockTopK
from tests.sparse_methods import paged

SIZE, DIM = 16, 8
KNOBS: dict[str, Any] = {"keep_ratio": 0.4, "min_blocks": 4}


def prompt(num_tokens: int, heads: int = 2, kv_heads: int = 2) -> tuple[Any, Any]:
    """Queries and keys whose means differ by block."""
    generator = torch.Generator().manual_seed(0)
    num_blocks = -(-num_tokens // SIZE)

    def draw(num_heads: int) -> torch.Tensor:
        centres = 2 * torch.randn(num_blocks, num_heads, DIM, generator=generator)
        noise = torch.randn(num_tokens, num_heads, DIM, generator=generator)
        return noise + centres.repeat_interleave(SIZE, 0)[:num_tokens]

    return draw(heads), draw(kv_heads)


def served(method: BlockTopK, query: Any, keys: Any, **cut: Any) -> list[list[list[int]]]:
    """Per tile and KV head, the blocks read."""
    selection = method.select_prefill(paged.prefill_view(query, keys, block_size=SIZE, **cut))
    assert selection.indices.dtype == selection.counts.dtype == torch.int32
    return [
        [blocks[:count] for blocks, count in zip(heads, counts, strict=True)]
        for heads, counts in zip(selection.indices.tolist(), selection.counts.tolist(), strict=True)
    ]


def expected(query: Any, keys: Any, own: int, knobs: dict[str, Any]) -> list[int]:
    """The rule in plain loops, for the queries [T, G, D] and keys [T, D] of a group."""
    kept = {block for block in (0, own - 1, own) if block >= 0}
    others = [block for block in range(own) if block not in kept]
    share = dict.fromkeys(others, 0.0)
    for head in range(query.shape[1]):
        mean = query[own * SIZE : (own + 1) * SIZE, head].mean(0)
        weight = {}
        for block in others:
            mean_key = keys[block * SIZE : (block + 1) * SIZE].mean(0)
            weight[block] = math.exp(float(mean @ mean_key) / math.sqrt(DIM))
        for block in others:
            share[block] += weight[block] / sum(weight.values())
    budget = max(math.ceil((own + 1) * knobs["keep_ratio"]), knobs["min_blocks"])
    best = sorted(others, key=lambda block: -share[block])
    return sorted(kept | set(best[: max(budget - len(kept), 0)]))


@pytest.mark.parametrize("num_tokens", [1, 16, 17, 130, 250])
@pytest.mark.parametrize("knobs", [KNOBS, {"keep_ratio": 0.01, "min_blocks": 3}])
def test_a_tile_reads_both_ends_and_the_best_of_the_rest(num_tokens, knobs):
    query, keys = prompt(num_tokens)
    for own, heads in enumerate(served(BlockTopK(knobs), query, keys)):
        for head, blocks in enumerate(heads):
            assert blocks == expected(query[:, head : head + 1], keys[:, head], own, knobs)


def test_a_group_adds_up_the_shares_of_its_heads():
    query, keys = prompt(250, heads=6)
    query[:, 0] *= 5  # would decide alone if scores were added up
    for own, heads in enumerate(served(BlockTopK(KNOBS), query, keys)):
        for kv_head, blocks in enumerate(heads):
            group = query[:, kv_head * 3 : kv_head * 3 + 3]
            assert blocks == expected(group, keys[:, kv_head], own, KNOBS)


def test_the_budget_is_a_share_of_what_is_visible_and_a_minimum():
    query, keys = prompt(480)
    for own, heads in enumerate(served(BlockTopK(KNOBS), query, keys)):
        budget = max(math.ceil(0.4 * (own + 1)), 4)
        assert {len(blocks) for blocks in heads} == {min(own + 1, budget)}
    everything = served(BlockTopK({"keep_ratio": 1.0}), query, keys)
    assert everything == [[list(range(own + 1))] * 2 for own in range(30)]


def test_chunks_do_not_change_a_list():
    query, keys = prompt(250)
    whole = served(BlockTopK(KNOBS), query, keys)
    cuts = [(0, 64), (64, 80), (80, 250)]
    parts = [served(BlockTopK(KNOBS), query, keys, start=a, stop=b) for a, b in cuts]
    assert [tile for part in parts for tile in part] == whole


def test_scores_keep_what_queries_and_keys_keep():
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(2, 12, 1, DIM, generator=generator).repeat_interleave(128, 1)[:, :1500]
    noise = torch.randn(2, 1500, 1, DIM, generator=generator)
    query, keys = 2 * centres + noise
    method = BlockTopK({"keep_ratio": 0.5, "min_blocks": 3})
    selection = method.select_prefill(paged.prefill_view(query, keys))
    scores = torch.einsum("qhd,khd->hqk", query, keys)[None] / math.sqrt(DIM)
    hidden = torch.ones(1500, 1500, dtype=torch.bool).triu(1)
    mask, stats = method.calculate_sparsity(scores.masked_fill(hidden, float("-inf")))
    assert 0 < stats["sparse_blocks"] < stats["total_blocks"]
    for own in range(12):
        row = mask[0, 0, min(own * 128 + 127, 1499)]
        blocks = {int(key) // 128 for key in row.nonzero()}
        assert blocks == set(selection.indices[own, 0, : selection.counts[own, 0]].tolist())


@pytest.mark.parametrize(
    ("knob", "value"),
    [("keep_ratio", 0.0), ("keep_ratio", 1.1), ("min_blocks", 2), ("min_blocks", 4097)],
)
def test_knobs_have_bounds(knob, value):
    with pytest.raises(InvalidKnobsError, match=knob):
        BlockTopK({knob: value})


def test_the_decisions_of_this_version():
    assert [heads[0] for heads in served(BlockTopK(KNOBS), *prompt(200))] == GOLDEN


GOLDEN = [
    [0],
    [0, 1],
    [0, 1, 2],
    [0, 1, 2, 3],
    [0, 1, 3, 4],
    [0, 1, 4, 5],
    [0, 2, 5, 6],
    [0, 5, 6, 7],
    [0, 3, 7, 8],
    [0, 7, 8, 9],
    [0, 4, 5, 9, 10],
    [0, 1, 4, 10, 11],
    [0, 1, 7, 10, 11, 12],
]
