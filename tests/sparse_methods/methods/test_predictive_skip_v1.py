import math
from typing import Any

import pytest
import torch

from sparse_methods import InvalidKnobsError, Phase, UnsupportedError
from sparse_methods.methods import predictive_skip_v1
from sparse_methods.methods.predictive_skip_v1 import PredictiveSkip
from tests.sparse_methods import paged

SIZE, DIM = 16, 8
KNOBS: dict[str, Any] = {"probe_rows": 4, "probe_keys": 4, "margin": 0.5, "threshold": 0.3}


def prompt(num_tokens: int, heads: int = 2, kv_heads: int = 2, seed: int = 0) -> tuple[Any, Any]:
    """Queries and keys whose mean scores differ by block."""
    generator = torch.Generator().manual_seed(seed)
    query = 2.5 * torch.randn(num_tokens, heads, DIM, generator=generator)
    keys = torch.randn(num_tokens, kv_heads, DIM, generator=generator)
    centres = torch.randn(-(-num_tokens // SIZE), kv_heads, DIM, generator=generator)
    return query, keys + centres.repeat_interleave(SIZE, 0)[:num_tokens]


def served(method: PredictiveSkip, query: Any, keys: Any, **cut: Any) -> list[list[list[int]]]:
    """Per tile and KV head, the list in visiting order."""
    selection = method.select_prefill(paged.prefill_view(query, keys, block_size=SIZE, **cut))
    assert selection.indices.dtype == selection.counts.dtype == torch.int32
    return [
        [blocks[:count] for blocks, count in zip(heads, counts, strict=True)]
        for heads, counts in zip(selection.indices.tolist(), selection.counts.tolist(), strict=True)
    ]


def kept_by_a_head(query: Any, keys: Any, own: int, knobs: dict[str, Any]) -> set[int]:
    """The rule in plain loops, for one head's queries and keys [T, D]."""
    num_tokens, step = query.shape[0], SIZE // knobs["probe_keys"]
    kept = {0, own}
    for probe in range(knobs["probe_rows"]):
        within = math.floor((probe + 0.5) * SIZE / knobs["probe_rows"])
        row = min(own * SIZE + within, num_tokens - 1)
        scores = [float(query[row] @ keys[key]) / math.sqrt(DIM) for key in range(row + 1)]
        highest = {0: max(scores[:SIZE]), own: max(scores[own * SIZE :])}
        for block in range(1, own):
            held = scores[block * SIZE : (block + 1) * SIZE]
            highest[block] = max(sum(held[i : i + step]) / step for i in range(0, SIZE, step))
        bar = max(highest.values()) + math.log(knobs["threshold"]) - knobs["margin"]
        kept |= {block for block, value in highest.items() if value > bar}
    return kept


def ordered(kept: set[int], own: int) -> list[int]:
    return [own, *sorted(kept - {own})]


@pytest.mark.parametrize("num_tokens", [1, 16, 17, 130, 192])
@pytest.mark.parametrize("knobs", [KNOBS, {**KNOBS, "probe_rows": 3, "probe_keys": 16}])
def test_a_list_holds_the_predicted_blocks_own_first_then_the_first_then_the_rest(
    num_tokens, knobs
):
    query, keys = prompt(num_tokens)
    lists = served(PredictiveSkip(knobs), query, keys)
    for own, heads in enumerate(lists):
        for head, blocks in enumerate(heads):
            kept = kept_by_a_head(query[:, head], keys[:, head], own, knobs)
            assert blocks == ordered(kept, own)


def test_some_blocks_are_kept_and_some_are_not():
    lists = served(PredictiveSkip(KNOBS), *prompt(192))
    chosen = sum(len(blocks) - (2 if own else 1) for own, h in enumerate(lists) for blocks in h)
    free = sum(max(own - 1, 0) for own in range(12)) * 2
    assert 0.1 * free < chosen < 0.9 * free


def test_a_group_reads_what_any_of_its_heads_would_read():
    query, keys = prompt(192, heads=6, kv_heads=2)
    for own, heads in enumerate(served(PredictiveSkip(KNOBS), query, keys)):
        for kv_head, blocks in enumerate(heads):
            alone = [
                kept_by_a_head(query[:, head], keys[:, kv_head], own, KNOBS)
                for head in range(kv_head * 3, kv_head * 3 + 3)
            ]
            assert blocks == ordered(set.union(*alone), own)


def test_slabs_and_chunks_do_not_change_a_list(monkeypatch):
    query, keys = prompt(180)
    whole = served(PredictiveSkip(KNOBS), query, keys)
    cuts = [(0, 64), (64, 80), (80, 180)]
    parts = [served(PredictiveSkip(KNOBS), query, keys, start=a, stop=b) for a, b in cuts]
    assert [tile for part in parts for tile in part] == whole
    monkeypatch.setattr(predictive_skip_v1, "_MAX_ESTIMATES", 1)
    assert served(PredictiveSkip(KNOBS), query, keys) == whole


def test_scores_keep_what_queries_and_keys_keep():
    generator = torch.Generator().manual_seed(1)
    query = 2.5 * torch.randn(1000, 2, DIM, generator=generator)
    centres = torch.randn(8, 2, DIM, generator=generator).repeat_interleave(128, 0)[:1000]
    keys = torch.randn(1000, 2, DIM, generator=generator) + centres
    method = PredictiveSkip({"margin": 0.5, "threshold": 0.5})
    selection = method.select_prefill(paged.prefill_view(query, keys))
    scores = torch.einsum("qhd,khd->hqk", query, keys)[None] / math.sqrt(DIM)
    hidden = torch.ones(1000, 1000, dtype=torch.bool).triu(1)
    mask, stats = method.calculate_sparsity(scores.masked_fill(hidden, float("-inf")))
    assert 0 < stats["sparse_blocks"] < stats["total_blocks"]
    for own in range(8):
        for head in range(2):
            row = mask[0, head, min(own * 128 + 127, 999)]
            blocks = {int(key) // 128 for key in row.nonzero()}
            count = selection.counts[own, head]
            assert blocks == set(selection.indices[own, head, :count].tolist())


def test_a_lower_threshold_and_a_wider_margin_read_more():
    query, keys = prompt(192)

    def count(**knobs: float) -> int:
        lists = served(PredictiveSkip({**KNOBS, **knobs}), query, keys)
        return sum(len(blocks) for heads in lists for blocks in heads)

    assert count(threshold=0.9) < count() < count(threshold=0.05)
    assert count(margin=0.0) < count() < count(margin=2.0)
    assert count(margin=30.0) == 2 * sum(range(1, 13))  # all that is visible
    assert count(margin=math.log(3), threshold=0.3) == count(margin=0.0, threshold=0.1)


def test_the_kernel_applies_the_threshold_to_prompts_only():
    method = PredictiveSkip({"threshold": 0.2})
    assert method.skip_threshold(Phase.PREFILL, 4096) == 0.2
    assert method.skip_threshold(Phase.DECODE, 4096) is None
    assert method.visits_diagonal_first(Phase.PREFILL)
    assert not method.visits_diagonal_first(Phase.DECODE)
    assert method.get_threshold_info() == {"type": "static", "value": {"prefill": 0.2}}


def test_groups_of_keys_must_divide_the_block():
    PredictiveSkip({"probe_keys": 16}).check_servable(128)
    with pytest.raises(UnsupportedError, match="must divide the block size, 128 tokens, got 12"):
        PredictiveSkip({"probe_keys": 12}).check_servable(128)


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("threshold", 0.0),
        ("threshold", 1.0),
        ("margin", -0.1),
        ("margin", 31.0),
        ("probe_rows", 0),
        ("probe_rows", 65),
        ("probe_keys", 0),
        ("probe_keys", 65),
    ],
)
def test_knobs_have_bounds(knob, value):
    with pytest.raises(InvalidKnobsError, match=knob):
        PredictiveSkip({knob: value})


def test_the_decisions_of_this_version():
    assert [heads[0] for heads in served(PredictiveSkip(KNOBS), *prompt(130))] == GOLDEN


GOLDEN = [
    [0],
    [1, 0],
    [2, 0, 1],
    [3, 0, 1],
    [4, 0, 1],
    [5, 0, 4],
    [6, 0, 1, 2, 3, 4, 5],
    [7, 0, 3, 6],
    [8, 0, 4],
]
