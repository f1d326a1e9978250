import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from sparse_methods import InvalidKnobsError
from sparse_methods.methods.snapkv_v1 import SnapKV
from tests.sparse_methods import paged

PAGE, HEADS, GROUP, DIM = 16, 2, 3, 8


def prompt(num_tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, Hq, D] queries and [T, Hkv, D] keys."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(num_tokens, HEADS * GROUP, DIM, generator=generator)
    return 3 * query, torch.randn(num_tokens, HEADS, DIM, generator=generator)


def expected_scores(query: torch.Tensor, keys: torch.Tensor, window: int) -> torch.Tensor:
    """The weights, row by row and head by head."""
    num_tokens = len(query)
    scores = torch.zeros(HEADS, math.ceil(num_tokens / PAGE))
    for row in range(max(0, num_tokens - window), num_tokens):
        for head in range(HEADS * GROUP):
            logits = keys[: row + 1, head // GROUP] @ query[row, head] / math.sqrt(DIM)
            for key, weight in enumerate(logits.softmax(-1)):
                scores[head // GROUP, key // PAGE] += weight
    return scores


def expected_pages(scores: list[float], own: int, window_page: int, knobs: dict[str, int]) -> Any:
    """The rule in words: both ends, and the best of what lies between."""
    width = knobs.get("pooling", SnapKV().knobs.pooling)
    pooled = [max(scores[max(0, p - width) : p + width + 1]) for p in range(len(scores))]
    ranked = sorted(range(1, window_page), key=lambda p: (-pooled[p], p))
    best = ranked[: knobs["budget_pages"]]
    return [p for p in range(own + 1) if p == 0 or p >= window_page or p in best]


def listed(selection: Any, row: int, head: int) -> list[int]:
    pages: list[int] = selection.indices[row, head, : selection.counts[row, head]].tolist()
    return pages


@pytest.mark.parametrize("num_tokens", [1, 5, 16, 100, 129])
@pytest.mark.parametrize("window", [1, 20, 200])
def test_pages_are_scored_by_the_weights_that_the_last_rows_give_them(num_tokens, window):
    query, keys = prompt(num_tokens)
    view = paged.prefill_view(query, keys, block_size=PAGE)
    scores = SnapKV({"window": window}).score_pages(view)
    assert scores is not None
    assert scores.dtype == torch.float32
    assert torch.allclose(scores, expected_scores(query, keys, window), atol=1e-4)
    assert scores.sum().item() == pytest.approx(HEADS * GROUP * min(window, num_tokens), rel=1e-5)


def test_a_chunk_before_the_window_leaves_nothing():
    query, keys = prompt(100)
    view = paged.prefill_view(query, keys, stop=80, block_size=PAGE)
    assert SnapKV({"window": 20}).score_pages(view) is None
    assert SnapKV({"window": 21}).score_pages(view) is not None


@pytest.mark.parametrize("cuts", [(0, 96, 112), (0, 16, 96, 112), (0, 80, 112)])
def test_scores_of_a_chunked_prompt_are_the_same_to_the_bit(cuts):
    method, (query, keys) = SnapKV({"window": PAGE}), prompt(105)
    whole = method.score_pages(paged.prefill_view(query, keys, block_size=PAGE))
    assert whole is not None
    total = torch.zeros_like(whole)
    for start, stop in pairwise(cuts):
        view = paged.prefill_view(query, keys, start=start, stop=min(stop, 105), block_size=PAGE)
        part = method.score_pages(view)
        if part is not None:
            total[:, : part.shape[1]] += part
    assert torch.equal(total, whole)


@pytest.mark.parametrize(
    "knobs",
    [
        {"budget_pages": 1, "window": 16},
        {"budget_pages": 3, "window": 40},
        {"budget_pages": 3, "window": 40, "pooling": 2},
        {"budget_pages": 100, "window": 1},
        {"budget_pages": 2, "window": 1000},
    ],
)
def test_both_ends_and_the_best_pages_of_the_prompt_are_read(knobs):
    prompt_lens, kv_lens = [200, 330, 15, 330], [200, 420, 40, 331]
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(4, HEADS, 27, generator=generator)
    query, keys = prompt(420)
    view = paged.decode_view(
        query[:4], keys, kv_lens, page_size=PAGE, prompt_lens=prompt_lens, page_scores=scores
    )
    selection = SnapKV(knobs).select_decode(view)
    for row, (prompt_len, kv_len) in enumerate(zip(prompt_lens, kv_lens, strict=True)):
        window_page = max(0, prompt_len - knobs["window"]) // PAGE
        for head in range(HEADS):
            given = scores[row, head].tolist()
            own = (kv_len - 1) // PAGE
            assert listed(selection, row, head) == expected_pages(given, own, window_page, knobs)


def test_heads_have_lists_of_their_own_and_generated_pages_change_neither():
    scores = torch.rand(1, HEADS, 26, generator=torch.Generator().manual_seed(2))
    scores[..., 20:] = 0
    query, keys = prompt(400)
    method = SnapKV({"budget_pages": 2, "window": 8})
    lists = []
    for kv_len in (320, 400):
        view = paged.decode_view(
            query[:1], keys, [kv_len], page_size=PAGE, prompt_lens=[320], page_scores=scores
        )
        lists.append([listed(method.select_decode(view), 0, head) for head in range(HEADS)])
    early, late = lists
    assert early[0] != early[1]
    assert late == [[*pages, 20, 21, 22, 23, 24] for pages in early]
    assert all(len(pages) == 4 for pages in early)


def test_without_scores_everything_is_read():
    query, keys = prompt(100)
    assert SnapKV().select_decode(paged.decode_view(query[:1], keys, [100])) is None


def test_equal_scores_fall_to_the_earlier_page():
    query, keys = prompt(320)
    view = paged.decode_view(
        query[:1], keys, [320], page_size=PAGE, page_scores=torch.zeros(1, HEADS, 20)
    )
    selection = SnapKV({"budget_pages": 3, "window": 1}).select_decode(view)
    assert listed(selection, 0, 0) == [0, 1, 2, 3, 19]


def test_one_row_of_scores_ranks_by_its_own_weights():
    scores = torch.zeros(1, 1, 1, 1280)
    scores[..., 300], scores[..., 800] = 8.0, 9.0
    mask, stats = SnapKV({"budget_pages": 2, "pooling": 0}).calculate_sparsity(scores)
    kept = mask[0, 0, 0].unflatten(0, (10, 128)).any(-1).nonzero().flatten().tolist()
    assert kept == [0, 2, 6, 9]
    assert (stats["total_blocks"], stats["sparse_blocks"]) == (10, 6)


def test_what_goes_on_in_the_next_page_stays_with_what_was_found():
    scores = torch.zeros(1, 1, 1, 1280)
    scores[..., 500] = 9.0  # an answer begins in page 3
    mask, _ = SnapKV({"budget_pages": 3}).calculate_sparsity(scores)
    assert mask[0, 0, 0].unflatten(0, (10, 128)).any(-1).nonzero().flatten().tolist() == [
        0,
        2,
        3,
        4,
        9,
    ]


def test_prompts_are_read_in_full():
    query, keys = prompt(300)
    assert SnapKV().select_prefill(paged.prefill_view(query, keys, block_size=PAGE)) is None
    mask, stats = SnapKV().calculate_sparsity(torch.zeros(1, 1, 300, 300))
    assert stats["sparse_blocks"] == 0
    assert mask.sum() == 300 * 301 / 2


def test_decisions_of_this_version_do_not_change():
    query, keys = prompt(30 * PAGE, seed=7)
    method = SnapKV({"budget_pages": 4, "window": 24, "pooling": 1})
    scores = method.score_pages(paged.prefill_view(query, keys, block_size=PAGE))
    assert scores is not None
    view = paged.decode_view(
        query[-1:], keys, [30 * PAGE], page_size=PAGE, page_scores=scores[None]
    )
    selection = method.select_decode(view)
    assert [listed(selection, 0, head) for head in range(HEADS)] == [
        [0, 15, 16, 17, 27, 28, 29],
        [0, 2, 12, 13, 14, 28, 29],
    ]


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("budget_pages", 0),
        ("budget_pages", 8193),
        ("window", 0),
        ("window", 1025),
        ("pooling", -1),
        ("pooling", 9),
    ],
)
def test_knobs_have_bounds(knob, value):
    with pytest.raises(InvalidKnobsError, match=knob):
        SnapKV({knob: value})
