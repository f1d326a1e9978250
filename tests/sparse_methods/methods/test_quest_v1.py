import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from sparse_methods import DecodeView, InvalidKnobsError, PageSelection
from sparse_methods.methods.quest_v1 import Quest
from tests.sparse_methods import paged

PAGE, HEADS, GROUP, DIM = 16, 2, 3, 8
KV_LENS = [1, 16, 17, 100, 333, 400]


def rows_and_keys(num_rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """[R, Hq, D] queries and [T, Hkv, D] keys of which a page's are alike."""
    generator = torch.Generator().manual_seed(seed)
    query = 2 * torch.randn(num_rows, HEADS * GROUP, DIM, generator=generator)
    centres = torch.randn(25, 1, HEADS, DIM, generator=generator).expand(-1, PAGE, -1, -1)
    noise = torch.randn(25 * PAGE, HEADS, DIM, generator=generator)
    return query, 2 * centres.flatten(0, 1) + 0.3 * noise


def view_of(kv_lens: list[int], layer: int = 0, seed: int = 0) -> DecodeView:
    query, keys = rows_and_keys(len(KV_LENS), seed)
    rows = query[[KV_LENS.index(length) for length in kv_lens]]
    return paged.decode_view(rows, keys, kv_lens, page_size=PAGE, layer=layer)


def choose(view: DecodeView, **knobs: object) -> PageSelection:
    selection = Quest(knobs).select_decode(view)
    assert selection is not None
    return selection


def listed(selection: Any, row: int, head: int) -> list[int]:
    pages: list[int] = selection.indices[row, head, : selection.counts[row, head]].tolist()
    return pages


def expected(row: int, head: int, budget: int, top_p: float | None = None) -> list[int]:
    """The rule in loops: own page, first page, then by the bounds summed over the group."""
    query, keys = rows_and_keys(len(KV_LENS))
    own = (KV_LENS[row] - 1) // PAGE
    visible = keys[: KV_LENS[row], head]
    bounds, weights = torch.zeros(own + 1), torch.zeros(GROUP, own + 1)
    for member in range(GROUP):
        q = query[row, head * GROUP + member] / math.sqrt(DIM)
        for page in range(own + 1):
            of_page = visible[page * PAGE : (page + 1) * PAGE]
            low, high = of_page.amin(0), of_page.amax(0)
            bound = sum(max(q[d] * low[d], q[d] * high[d]) for d in range(DIM))
            mean = q @ of_page.mean(0)
            bounds[page] += bound
            weights[member, page] = math.log(len(of_page)) + mean
    others = [page for page in range(own + 1) if page not in {0, own}]
    others.sort(key=lambda page: -bounds[page].item())
    order = [own, 0, *others][:budget] if own else [0]
    if top_p is None:
        return order
    shares, read = weights.softmax(-1).mean(0), 0.0
    for count, page in enumerate(order):
        if count >= 2 and read >= top_p:
            return order[:count]
        read += shares[page].item()
    return order


@pytest.mark.parametrize("budget", [2, 3, 5, 100])
def test_a_group_reads_the_pages_of_the_largest_bounds(budget):
    selection = choose(view_of(KV_LENS), budget_pages=budget, top_p=None)
    assert selection.indices.dtype == selection.counts.dtype == torch.int32
    for row in range(len(KV_LENS)):
        for head in range(HEADS):
            assert listed(selection, row, head) == expected(row, head, budget)


@pytest.mark.parametrize("top_p", [0.3, 0.7, 0.9, 0.99])
def test_pages_are_read_in_this_order_until_the_share_is_reached(top_p):
    selection = choose(view_of(KV_LENS), budget_pages=12, top_p=top_p)
    for row in range(len(KV_LENS)):
        for head in range(HEADS):
            assert listed(selection, row, head) == expected(row, head, 12, top_p)


def test_the_share_decides_between_the_least_and_the_budget():
    sizes = {
        top_p: choose(view_of([400]), budget_pages=12, top_p=top_p).counts
        for top_p in (0.01, 0.5, 0.999999)
    }
    assert (sizes[0.01] == 2).all()
    assert (sizes[0.5] <= sizes[0.999999]).all()
    assert 2 < sizes[0.999999].max() <= 12
    assert sizes[0.5].sum() < sizes[0.999999].sum()


def test_no_score_of_a_page_exceeds_what_it_is_ranked_by():
    """A page with one huge key is found, however small its mean."""
    query, keys = rows_and_keys(1)
    keys = 0.1 * keys
    keys[5 * PAGE + 3, :] = 50 * query[0, ::GROUP].sign()
    query = query[:, ::GROUP].repeat_interleave(GROUP, 1)
    view = paged.decode_view(query, keys, [400], page_size=PAGE)
    selection = choose(view, budget_pages=3, top_p=None)
    assert listed(selection, 0, 0) == listed(selection, 0, 1) == [24, 0, 5]


def test_a_row_reads_the_same_beside_a_longer_one():
    before, after = view_of([333]), view_of([333, 400])
    alone, together = choose(before, budget_pages=6), choose(after, budget_pages=6)
    for head in range(HEADS):
        assert listed(alone, 0, head) == listed(together, 0, head)


def test_capacity_does_not_depend_on_lengths():
    short = replace(view_of([400]), kv_lens=torch.tensor([3], dtype=torch.int32))
    for view in (short, view_of([400])):
        assert choose(view, budget_pages=7).indices.shape == (1, HEADS, 7)


def test_the_first_layers_read_everything_if_so_told():
    method = Quest({"dense_layers": 2})
    assert method.select_decode(view_of([400], layer=1)) is None
    assert method.select_decode(view_of([400], layer=2)) is not None


def test_summaries_are_needed():
    with pytest.raises(ValueError, match="no page summaries"):
        Quest().select_decode(replace(view_of([400]), summaries=None))


def test_the_mask_keeps_the_pages_of_the_largest_scores():
    scores = torch.zeros(1, 2, 1, 1200)
    scores[0, 0, 0, 300], scores[0, 0, 0, 900] = 5.0, 6.0
    scores[0, 1, 0, 700], scores[0, 1, 0, 701] = 5.0, 5.0
    mask, stats = Quest({"budget_pages": 3, "top_p": None}).calculate_sparsity(scores)
    padded = torch.nn.functional.pad(mask, (0, 80)).unflatten(-1, (10, 128)).any(-1)[0, :, 0]
    assert [head.nonzero().flatten().tolist() for head in padded] == [[0, 7, 9], [0, 5, 9]]
    assert (stats["total_blocks"], stats["sparse_blocks"]) == (20, 14)


@pytest.mark.parametrize("knobs", [{"budget_pages": 4, "top_p": None}, {"top_p": 0.6}])
def test_pages_of_equal_keys_are_kept_by_scores_as_they_are_served(knobs):
    """Then bound, largest score and mean score are one."""
    generator = torch.Generator().manual_seed(5)
    keys = torch.randn(10, HEADS, DIM, generator=generator).repeat_interleave(128, 0)
    query = 2 * torch.randn(1, HEADS, DIM, generator=generator)
    served = choose(paged.decode_view(query, keys, [1200]), **knobs)
    scores = torch.einsum("rhd,khd->hrk", query, keys[:1200])[None] / math.sqrt(DIM)
    mask, _ = Quest(knobs).calculate_sparsity(scores)
    padded = torch.nn.functional.pad(mask, (0, 80)).unflatten(-1, (10, 128)).any(-1)[0, :, 0]
    for head in range(HEADS):
        pages = sorted(listed(served, 0, head))
        assert padded[head].nonzero().flatten().tolist() == pages
        assert 2 < len(pages) < 10


def test_prompts_are_read_in_full():
    query, keys = rows_and_keys(300)
    assert Quest().select_prefill(paged.prefill_view(query, keys[:300], block_size=PAGE)) is None
    _, stats = Quest().calculate_sparsity(torch.zeros(1, 1, 300, 300))
    assert stats["sparse_blocks"] == 0


def test_decisions_of_this_version_do_not_change():
    selection = choose(view_of([333, 400], seed=7), budget_pages=9, top_p=0.7)
    lists = [[listed(selection, row, head) for head in range(HEADS)] for row in range(2)]
    assert lists == [
        [[20, 0, 11, 18, 2, 12, 16, 4], [20, 0, 11, 7, 9, 16, 15, 13]],
        [[24, 0, 7, 10, 3, 1], [24, 0, 3, 15, 16, 7, 11]],
    ]


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("budget_pages", 1),
        ("budget_pages", 8193),
        ("top_p", 0.0),
        ("top_p", 1.0),
        ("dense_layers", -1),
        ("dense_layers", 1025),
    ],
)
def test_knobs_have_bounds(knob, value):
    with pytest.raises(InvalidKnobsError, match=knob):
        Quest({knob: value})


def test_keys_of_later_rows_in_the_own_page_do_not_count():
    """A request that starts over writes the keys of many rows before it decides for the first."""
    view = view_of([333, 400])
    before = choose(view, top_p=0.8)
    assert view.summaries is not None
    own_pages = view.pages[torch.arange(2), view.own_pages.long()]
    view.summaries.total[own_pages] += 30 * view.query[:, ::GROUP]
    after = choose(view, top_p=0.8)
    assert torch.equal(after.counts, before.counts)
    assert (before.counts > 2).any()
    for row in range(2):
        for head in range(HEADS):
            assert listed(after, row, head) == listed(before, row, head)


def test_it_falls_back_only_if_no_row_reached_its_break_even():
    quest = Quest({"dense_below": 100})
    assert quest.fallback(99, 100) is None
    assert quest.fallback(100) is None
    fallback = quest.fallback(90, 99)
    assert fallback is not None
    assert fallback.to == "dense"
    assert "context grew to 99 tokens" in fallback.reason
