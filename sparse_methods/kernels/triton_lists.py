"""Rules that choose columns of a row, and the lists of what was chosen, in Triton.

One program holds one row. Nothing is sorted: whoever comes before an entry, by falling rank and of
equals the earlier, is found by bisection on the bits of the ranks, and weighed in fixed point. Such
sums are the same in any order and beside any number of zeros, so a row of a chunk or of a batch is
decided as the row alone, to the last bit.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from sparse_methods.kernels.selection import OwnedLists

MASS_BITS = tl.constexpr(42)  # of a packed weight; how many entries it stands for lies above
_MASS_MASK = tl.constexpr((1 << 42) - 1)
ONE = tl.constexpr(1 << 40)  # a mass of 1 in fixed point
_LEAST = tl.constexpr(-(2**31))
_MERGED_ENTRIES = 128  # of a list that are copied at once
_VARYING = ["num_columns"]  # no reason to compile anew


def largest(values: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """``selection.largest``."""
    is_kept = torch.empty_like(values, dtype=torch.bool, memory_format=torch.contiguous_format)
    limits = counts.to(torch.int32).expand(*values.shape[:-1], 1).contiguous()
    if is_kept.numel():
        _largest_kernel[(limits.numel(),)](
            values.contiguous(), limits, is_kept.view(torch.uint8), **row_of(values.shape[-1])
        )
    return is_kept


def covering(ranks: torch.Tensor, mass: torch.Tensor, share: float) -> torch.Tensor:
    """``selection.covering``."""
    is_kept = torch.empty_like(mass, dtype=torch.bool, memory_format=torch.contiguous_format)
    if is_kept.numel():
        _covering_kernel[(is_kept.numel() // mass.shape[-1],)](
            ranks.contiguous(),
            mass.contiguous(),
            is_kept.view(torch.uint8),
            share,
            **row_of(mass.shape[-1]),
        )
    return is_kept


def group_shares(
    scores: torch.Tensor, tile_blocks: torch.Tensor, first: int, recent: int
) -> torch.Tensor:
    """``selection.group_shares``."""
    group, num_tiles, num_columns = scores.shape[-3:]
    shares = scores.new_empty(*scores.shape[:-3], num_tiles, num_columns, dtype=torch.float32)
    if shares.numel():
        _group_shares_kernel[(num_tiles, shares.numel() // (num_tiles * num_columns))](
            scores.contiguous(),
            tile_blocks,
            shares,
            first,
            recent,
            GROUP=group,
            **row_of(num_columns),
        )
    return shares


def list_kept(
    is_kept: torch.Tensor, leading: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``selection.list_kept``."""
    table = is_kept if is_kept.stride(-1) == 1 else is_kept.contiguous()
    num_rows, num_heads, num_columns = table.shape
    indices = table.new_empty(table.shape, dtype=torch.int32)
    counts = table.new_empty(num_rows, num_heads, dtype=torch.int32)
    if indices.numel():
        _list_kernel[(num_heads, num_rows)](
            table.view(torch.uint8),
            leading,
            indices,
            counts,
            table.stride(0),
            table.stride(1),
            **row_of(num_columns),
        )
    return indices, counts


def merge_into(indices: torch.Tensor, counts: torch.Tensor, parts: Sequence[OwnedLists]) -> None:
    """``selection.merge``, one launch per part; ``counts`` come as -1."""
    num_rows, num_heads, capacity = indices.shape
    for part in parts:
        _merge_kernel[(num_heads, num_rows)](
            part.indices,
            part.counts,
            part.members.view(torch.uint8),
            indices,
            counts,
            capacity,
            *part.indices.stride()[:2],
            *part.counts.stride(),
            num_columns=part.indices.shape[2],
            BLOCK=_MERGED_ENTRIES,
            num_warps=1,
        )


def row_of(num_columns: int) -> dict[str, Any]:
    """How a program holds a row of so many columns."""
    block = triton.next_power_of_2(num_columns)
    return {
        "num_columns": num_columns,
        "BLOCK": block,
        "num_warps": min(16, max(1, block // 256)),
    }


@triton.jit
def ordered(values):
    """[n] int32 in the order of the [n] float32; both zeros are one."""
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def fixed_total(weights):
    """Sum of [n] float32 weights from 0 to 1, to 40 bits behind the point, in any order."""
    return tl.sum((weights * ONE).to(tl.int64), 0).to(tl.float32) / ONE


@triton.jit
def taken(keys, weights, budget, target):
    """[n] entries before which fewer than ``budget`` come, whose mass is below ``target``.

    Before an entry come those of larger ``keys``, and of equal ones the earlier. ``weights`` are
    packed: number << MASS_BITS | mass.
    """
    low, high = tl.min(keys, 0), tl.max(keys, 0)
    while low < high:  # the least key such that what lies above it is within both limits
        middle = (low & high) + ((low ^ high) >> 1)
        above = tl.sum(tl.where(keys > middle, weights, 0), 0)
        is_within = ((above >> MASS_BITS) < budget) & ((above & _MASS_MASK) < target)
        low = tl.where(is_within, low, middle + 1)
        high = tl.where(is_within, middle, high)
    above = tl.sum(tl.where(keys > high, weights, 0), 0)
    equal = tl.where(keys == high, weights, 0)
    before = above + tl.cumsum(equal, 0) - equal
    is_within = ((before >> MASS_BITS) < budget) & ((before & _MASS_MASK) < target)
    return (keys > high) | ((keys == high) & is_within)


@triton.jit(do_not_specialize=_VARYING)
def _largest_kernel(values, counts, is_kept, num_columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    is_column = columns < num_columns
    row_values = tl.load(values + row * num_columns + columns, mask=is_column, other=0.0)
    keys = tl.where(is_column, ordered(row_values.to(tl.float32)), _LEAST)
    weights = is_column.to(tl.int64) << MASS_BITS
    kept = taken(keys, weights, tl.load(counts + row), 1)
    tl.store(is_kept + row * num_columns + columns, kept.to(tl.uint8), mask=is_column)


@triton.jit(do_not_specialize=_VARYING)
def _covering_kernel(ranks, mass, is_kept, share, num_columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    is_column = columns < num_columns
    at = row * num_columns + columns
    keys = ordered(tl.load(ranks + at, mask=is_column, other=0.0).to(tl.float32))
    keys = tl.where(is_column, keys, _LEAST)
    row_mass = tl.load(mass + at, mask=is_column, other=0.0)
    most = tl.max(row_mass, 0)
    relative = row_mass / tl.where(most > 0.0, most, 1.0)
    total = fixed_total(relative)
    weights = (relative / tl.where(total > 0.0, total, 1.0) * ONE).to(tl.int64)
    exact = tl.sum(weights, 0).to(tl.float64) * share
    target = exact.to(tl.int64)
    target += (target.to(tl.float64) < exact).to(tl.int64)
    kept = taken(keys, weights, 1, target)  # the masses alone count
    tl.store(is_kept + at, (kept & is_column).to(tl.uint8), mask=is_column)


@triton.jit(do_not_specialize=[*_VARYING, "first", "recent"])
def _group_shares_kernel(
    scores, tile_blocks, shares, first, recent, num_columns,
    GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tile, group, num_tiles = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    own = tl.load(tile_blocks + tile).to(tl.int32)
    columns = tl.arange(0, BLOCK)
    is_choice = (columns >= first) & (columns <= own - recent) & (columns < num_columns)
    total = tl.zeros([BLOCK], tl.float32)
    for head in tl.static_range(GROUP):
        row = ((group * GROUP + head) * num_tiles + tile) * num_columns
        score = tl.load(scores + row + columns, mask=is_choice, other=float("-inf")).to(tl.float32)
        highest = tl.maximum(tl.max(score, 0), -3.0e38)
        weights = tl.exp(score - highest)
        total += weights / tl.maximum(fixed_total(weights), 1.0)
    forced = tl.where(columns <= own, float("inf"), -1.0)
    row = (group * num_tiles + tile) * num_columns
    mask = columns < num_columns
    tl.store(shares + row + columns, tl.where(is_choice, total, forced), mask=mask)


@triton.jit(do_not_specialize=[*_VARYING, "row_stride", "head_stride"])
def _list_kernel(
    is_kept, leading, indices, counts, row_stride, head_stride, num_columns, BLOCK: tl.constexpr
):
    head, row, num_heads = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    columns = tl.arange(0, BLOCK)
    is_column = columns < num_columns
    table = is_kept + row * row_stride + head * head_stride
    kept = tl.load(table + columns, mask=is_column, other=0).to(tl.int32)
    before = tl.cumsum(kept, 0) - kept
    count = tl.sum(kept, 0)
    if leading is not None:  # it moves to the front, and what lies before it gives way
        first = tl.load(leading + row).to(tl.int32)
        before = tl.where(columns == first, 0, before + (columns < first).to(tl.int32))
        others = tl.cumsum(1 - kept, 0) - (1 - kept)
    else:
        others = columns - before
    place = tl.where(kept != 0, before, count + others)
    at = row * num_heads + head
    tl.store(indices + at * num_columns + place, columns, mask=is_column)
    tl.store(counts + at, count)


@triton.jit(
    do_not_specialize=[
        *_VARYING,
        "capacity",
        "row_stride",
        "head_stride",
        "count_row",
        "count_head",
    ]
)
def _merge_kernel(
    listed, listed_counts, members, indices, counts, capacity, row_stride, head_stride, count_row,
    count_head, num_columns, BLOCK: tl.constexpr,
):  # fmt: skip
    head, row, num_heads = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    if tl.load(members + row) == 0:
        return
    count = tl.load(listed_counts + row * count_row + head * count_head)
    source = listed + row * row_stride + head * head_stride
    for start in range(0, tl.minimum(count, num_columns), BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < num_columns
        entries = tl.load(source + columns, mask=mask)
        tl.store(indices + (row * num_heads + head) * capacity + columns, entries, mask=mask)
    tl.store(counts + row * num_heads + head, count)
