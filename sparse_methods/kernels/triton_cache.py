"""Writing keys and values into their pages in Triton, with the summaries of the pages.

One kernel does both. A program owns the rows of one page and one head, so that nothing races; it
adds keys up in the order of their rows, as ``page_summary`` does, to the same bits.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from sparse_methods.kernels.page_summary import CacheUpdate
from sparse_methods.kernels.triton_launch import as_dependent, await_earlier

_ROWS = 16  # rows that are moved at once, and rows of a program that owns no page
_SEGMENTS = 1024  # lengths that are added up at once


def write_cache(update: CacheUpdate) -> None:
    """Write the rows, and fold their keys into the summaries."""
    keys, values = (
        rows if rows.stride(2) == 1 else rows.contiguous() for rows in (update.keys, update.values)
    )
    num_rows, num_heads, head_dim = keys.shape
    owned = _owned_pages(update)
    num_programs = owned["pages"].shape[0] if owned["pages"] is not None else -(-num_rows // _ROWS)
    if not num_programs:
        return
    _write_kernel[(num_heads, num_programs)](
        keys,
        values,
        update.key_cache,
        update.value_cache,
        update.slot_mapping,
        num_rows,
        *keys.stride()[:2],
        *values.stride()[:2],
        *update.key_cache.stride()[1:3],
        *update.value_cache.stride()[1:3],
        **owned,
        HEAD_DIM=head_dim,
        VALUE_DIM=values.shape[2],
        CHANNELS=triton.next_power_of_2(head_dim),
        VALUE_CHANNELS=triton.next_power_of_2(values.shape[2]),
        ROWS=_ROWS,
        SEGMENTS=_SEGMENTS,
        num_warps=2,
        **as_dependent(keys.device),
    )


def _owned_pages(update: CacheUpdate) -> dict[str, Any]:
    segments, summaries = update.segments, update.summaries
    if segments is None:
        names = ("pages", "lengths", "continues", "minimum", "maximum", "totals")
        return dict.fromkeys(names)
    return {
        "pages": segments.pages,
        "lengths": segments.lengths,
        "continues": segments.continues.view(torch.uint8),
        "minimum": summaries.minimum,
        "maximum": summaries.maximum,
        "totals": summaries.total,
    }


@triton.jit
def _copy(rows, cache, slots, is_row, slot_stride, DIM: tl.constexpr, CHANNELS: tl.constexpr):
    """Move rows, given by pointers [ROWS] to their first element, to their slots."""
    channels = tl.arange(0, CHANNELS)
    mask = is_row[:, None] & (channels < DIM)
    data = tl.load(rows[:, None] + channels, mask=mask)
    tl.store(cache + slots[:, None] * slot_stride + channels, data.to(cache.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["num_rows"])
def _write_kernel(
    keys, values, key_cache, value_cache, slot_mapping, num_rows,
    key_row_stride, key_head_stride, value_row_stride, value_head_stride,
    key_slot_stride, key_cache_head_stride, value_slot_stride, value_cache_head_stride,
    pages, lengths, continues, minimum, maximum, totals,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, CHANNELS: tl.constexpr,
    VALUE_CHANNELS: tl.constexpr, ROWS: tl.constexpr, SEGMENTS: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Rows of one head: those of a segment with its summaries, or ROWS of them without."""
    await_earlier(IS_DEPENDENT)
    head, program = tl.program_id(0), tl.program_id(1)
    channels = tl.arange(0, CHANNELS)
    is_channel = channels < HEAD_DIM
    first, length = program.to(tl.int64) * ROWS, ROWS
    if pages is not None:
        length = tl.load(lengths + program)
        first = length * 0
        for start in range(0, program, SEGMENTS):
            earlier = start + tl.arange(0, SEGMENTS)
            sizes = tl.load(lengths + earlier, mask=earlier < program, other=0)
            first += tl.sum(sizes, 0)
    stop = tl.minimum(first + length, num_rows)
    keys += head * key_head_stride
    values += head * value_head_stride
    key_cache += head * key_cache_head_stride
    value_cache += head * value_cache_head_stride
    low = tl.full([CHANNELS], float("inf"), tl.float32)
    high = tl.full([CHANNELS], float("-inf"), tl.float32)
    total = tl.zeros([CHANNELS], tl.float32)
    for start in range(first, stop, ROWS):
        if pages is not None:
            for offset in tl.static_range(ROWS):  # one by one: the order fixes the sum
                row = start + offset + tl.zeros([CHANNELS], tl.int64)
                mask = is_channel & (row < stop)
                key = tl.load(keys + row * key_row_stride + channels, mask=mask, other=0.0)
                key = key.to(tl.float32)
                low = tl.where(mask, tl.minimum(low, key), low)
                high = tl.where(mask, tl.maximum(high, key), high)
                total += key
        rows = start + tl.arange(0, ROWS)
        is_row = rows < stop
        slots = tl.load(slot_mapping + rows, mask=is_row, other=0)
        _copy(
            keys + rows * key_row_stride, key_cache, slots, is_row,
            key_slot_stride, HEAD_DIM, CHANNELS,
        )  # fmt: skip
        _copy(
            values + rows * value_row_stride, value_cache, slots, is_row,
            value_slot_stride, VALUE_DIM, VALUE_CHANNELS,
        )  # fmt: skip
    if pages is not None:
        page = tl.load(pages + program)
        at = (page * tl.num_programs(0) + head) * HEAD_DIM + channels
        mask = channels < tl.where(tl.load(continues + program) != 0, HEAD_DIM, 0)
        low = tl.minimum(low, tl.load(minimum + at, mask, other=float("inf")).to(tl.float32))
        high = tl.maximum(high, tl.load(maximum + at, mask, other=float("-inf")).to(tl.float32))
        total += tl.load(totals + at, mask, other=0.0)
        tl.store(minimum + at, low.to(minimum.dtype.element_ty), mask=is_channel)
        tl.store(maximum + at, high.to(maximum.dtype.element_ty), mask=is_channel)
        tl.store(totals + at, total, mask=is_channel)
