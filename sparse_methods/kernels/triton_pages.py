"""The pages that decode rows read by their bounds (``quest``), in Triton: two launches.

The first scores the pages of a row for all query heads of a group at once, so that a page's
summary moves once per group; the second chooses and writes the lists. Grids depend on the number of
rows and of pages a view has, never on lengths, so a CUDA graph can capture a call, and a row is
decided as it is alone, to the last bit.
"""

import math

import torch
import triton
import triton.language as tl

from sparse_methods.kernels.triton_lists import MASS_BITS, ONE, fixed_total, ordered, row_of, taken
from sparse_methods.views import DecodeView, PageSelection, PageSummaries

_PAGES = 16  # of a program
_SLOTS = 64  # keys of the row's own page that are added up at once
_VARYING = ["pages_stride", "num_columns"]  # no reason to compile anew


def select_by_bounds(
    view: DecodeView, summaries: PageSummaries, budget: int, top_p: float | None
) -> PageSelection:
    """The first page, the row's own, and those of the largest bounds, summed over the group.

    Args:
        view: The rows.
        summaries: Of the view's pages.
        budget: Most pages a row reads, at least 2.
        top_p: Share of the estimated weight at which a row has enough; None fills the budget.

    Returns:
        [R, Hkv, min(budget, M)] pages, ascending, and [R, Hkv] how many.
    """
    num_rows, max_pages, num_heads = view.query.shape[0], view.max_pages, view.num_kv_heads
    group, capacity = view.query.shape[1] // num_heads, min(budget, max_pages)
    bounds = view.query.new_empty(num_rows, num_heads, max_pages, dtype=torch.float32)
    weights = None if top_p is None else bounds.new_empty(num_rows, num_heads, group, max_pages)
    indices = bounds.new_empty(num_rows, num_heads, capacity, dtype=torch.int32)
    counts = bounds.new_empty(num_rows, num_heads, dtype=torch.int32)
    selection = PageSelection(indices, counts)
    if not num_rows:
        return selection
    _score(view, summaries, bounds, weights)
    _select_kernel[(num_heads, num_rows)](
        bounds,
        weights,
        view.kv_lens,
        indices,
        counts,
        capacity,
        1 if top_p is None else math.ceil(top_p * ONE.value),
        GROUP=group,
        PAGE=view.page_size,
        **row_of(max_pages),
    )
    return selection


def _score(
    view: DecodeView,
    summaries: PageSummaries,
    bounds: torch.Tensor,
    weights: torch.Tensor | None,
) -> None:
    query, keys = view.query, view.keys
    query = query if query.stride(2) == 1 else query.contiguous()
    num_rows, num_heads, max_pages = bounds.shape
    _score_kernel[(triton.cdiv(max_pages, _PAGES), num_heads, num_rows)](
        query,
        *query.stride()[:2],
        keys,
        *keys.stride()[:3],
        view.pages,
        view.pages.stride(0),
        view.kv_lens,
        summaries.minimum,
        summaries.maximum,
        summaries.total,
        bounds,
        weights,
        view.scale,
        num_columns=max_pages,
        GROUP=query.shape[1] // num_heads,
        PAGE=view.page_size,
        HEAD_DIM=query.shape[2],
        CHANNELS=triton.next_power_of_2(query.shape[2]),
        PAGES=_PAGES,
        SLOTS=min(_SLOTS, triton.next_power_of_2(view.page_size)),
        num_warps=4,
    )


@triton.jit
def _group_row(query, row_stride, head_stride, row, head, channels, scale, HEAD_DIM: tl.constexpr):
    """[CHANNELS] float32 scaled query of one head."""
    at = row * row_stride + head * head_stride + channels
    return tl.load(query + at, mask=channels < HEAD_DIM, other=0.0).to(tl.float32) * scale


@triton.jit
def _key_sum(
    keys, slot_stride, num_keys, channels,
    HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """[CHANNELS] float32 sum of the first keys of a page."""
    total = tl.zeros([SLOTS, CHANNELS], tl.float32)
    for start in range(0, num_keys, SLOTS):
        slots = start + tl.arange(0, SLOTS)
        mask = (slots < num_keys)[:, None] & (channels < HEAD_DIM)
        block = tl.load(keys + slots[:, None] * slot_stride + channels, mask=mask, other=0.0)
        total += block.to(tl.float32)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=_VARYING)
def _score_kernel(
    query, query_row_stride, query_head_stride,
    keys, key_page_stride, key_slot_stride, key_head_stride,
    pages, pages_stride, kv_lens, minimum, maximum, totals, bounds, weights, scale, num_columns,
    GROUP: tl.constexpr, PAGE: tl.constexpr, HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr,
    PAGES: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Bounds [R, Hkv, M] summed over a group, and log weights [R, Hkv, G, M] of some pages."""
    chunk, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    num_heads = tl.num_programs(1)
    kv_len = tl.load(kv_lens + row).to(tl.int32)
    own = (kv_len - 1) // PAGE
    if chunk * PAGES > own:
        return
    columns, channels = chunk * PAGES + tl.arange(0, PAGES), tl.arange(0, CHANNELS)
    is_seen = columns <= own
    page = tl.load(pages + row * pages_stride + columns, mask=is_seen, other=0).to(tl.int64)
    at = (page * num_heads + head)[:, None] * HEAD_DIM + channels
    mask = is_seen[:, None] & (channels < HEAD_DIM)
    low = tl.load(minimum + at, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(maximum + at, mask=mask, other=0.0).to(tl.float32)
    positive, negative = tl.zeros([CHANNELS], tl.float32), tl.zeros([CHANNELS], tl.float32)
    for member in tl.static_range(GROUP):
        channel = _group_row(
            query, query_row_stride, query_head_stride, row, head * GROUP + member, channels,
            scale, HEAD_DIM,
        )  # fmt: skip
        positive += tl.maximum(channel, 0.0)
        negative += tl.minimum(channel, 0.0)
    first = row * num_heads + head
    bound = tl.sum(high * positive + low * negative, 1)
    tl.store(bounds + first * num_columns + columns, bound, mask=is_seen)
    if weights is not None:
        # Of the own page the row's keys alone count: its summary may hold later ones.
        num_own = kv_len - own * PAGE
        is_own = columns == own
        own_page = tl.load(pages + row * pages_stride + own).to(tl.int64)
        own_total = _key_sum(
            keys + own_page * key_page_stride + head * key_head_stride, key_slot_stride,
            tl.where(own < (chunk + 1) * PAGES, num_own, 0), channels,
            HEAD_DIM, CHANNELS, SLOTS,
        )  # fmt: skip
        total = tl.load(totals + at, mask=mask, other=0.0)
        total = tl.where(is_own[:, None], own_total[None, :], total)
        num_keys = tl.where(is_own, num_own, PAGE).to(tl.float32)
        for member in tl.static_range(GROUP):
            channel = _group_row(
                query, query_row_stride, query_head_stride, row, head * GROUP + member, channels,
                scale, HEAD_DIM,
            )  # fmt: skip
            weight = tl.log(num_keys) + tl.sum(total * channel, 1) / num_keys
            place = (first * GROUP + member) * num_columns + columns
            tl.store(weights + place, weight, mask=is_seen)


@triton.jit(do_not_specialize=["budget", "target", "num_columns"])
def _select_kernel(
    bounds, weights, kv_lens, indices, counts, budget, target, num_columns,
    GROUP: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Lists [R, Hkv, budget] of the pages within the budget and before the share is reached."""
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    own = (tl.load(kv_lens + row).to(tl.int32) - 1) // PAGE
    columns = tl.arange(0, BLOCK)
    is_seen = columns <= own
    is_forced = (columns == 0) | (columns == own)
    first = row * tl.num_programs(0) + head
    bound = tl.load(bounds + first * num_columns + columns, mask=is_seen, other=0.0)
    keys = tl.where(is_forced, 0x7FFFFFFF, ordered(bound))
    keys = tl.where(is_seen, keys, -(2**31))
    packed = is_seen.to(tl.int64) << MASS_BITS
    if weights is not None:
        share = tl.zeros([BLOCK], tl.float32)
        for member in tl.static_range(GROUP):
            place = (first * GROUP + member) * num_columns + columns
            weight = tl.load(weights + place, mask=is_seen, other=float("-inf"))
            relative = tl.exp(weight - tl.max(weight, 0))
            share += relative / fixed_total(relative)
        packed += (share / GROUP * ONE).to(tl.int64)
    kept = ((taken(keys, packed, budget, target) | is_forced) & is_seen).to(tl.int32)
    before = tl.cumsum(kept, 0) - kept
    count = tl.sum(kept, 0)
    place = tl.where(kept != 0, before, count + columns - before)
    tl.store(indices + first * budget + place, columns, mask=place < budget)
    tl.store(counts + first, count)
