"""Which blocks come near the largest score of some probed rows (``predictive_skip``), in Triton.

Four launches: means of groups of keys; scores of the probed rows in their own block and the first
one; products of the rows with the means, of which the largest of a block is kept; and the
comparison with the largest of the row. Rows and keys are read where they lie, and scores of groups
stay out of memory.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from sparse_methods.kernels.triton_lists import row_of
from sparse_methods.kernels.triton_means import row_major
from sparse_methods.views import PrefillView

_ROWS = 128  # probed rows of a program
_GROUPS = 128  # groups of keys of a program
_SLOTS = 64  # keys that probed rows are scored with at once
_ROW_BYTES = 512  # of a row that fits beside the others
_MAX_HELD = 1 << 26  # estimates between the launches: 256 MiB


@dataclass(frozen=True)
class Probe:
    """What is looked at.

    Attributes:
        rows: Query rows of a tile, evenly spread.
        groups: Groups of consecutive keys of a block; divides it.
        reach: What an estimate may lie above or, if negative, below the largest score, nats.
    """

    rows: int
    groups: int
    reach: float


def can_probe(view: PrefillView, probe: Probe) -> bool:
    """Whether programs hold the rows and the groups of a block."""
    size: int = triton.next_power_of_2(view.query.shape[2]) * view.query.element_size()
    is_power = probe.groups & (probe.groups - 1) == 0
    num_probed = probe.rows * view.query.shape[1] // view.num_kv_heads
    return size <= _ROW_BYTES and is_power and probe.groups <= _GROUPS and num_probed <= _ROWS


def near_largest(view: PrefillView, probe: Probe) -> torch.Tensor:
    """Blocks of which an estimate comes near the largest of a probed row.

    Returns:
        [Hkv, N, M] bool, of any head of the group; the own and the first block are kept.
    """
    per_tile = probe.rows * view.query.shape[1] // view.num_kv_heads
    shape = (view.num_kv_heads, view.num_tiles, view.num_blocks)
    groups = _group_means(view, probe)
    limits = _highest_in_full(view, probe, per_tile)
    is_kept = torch.empty(shape, dtype=torch.bool, device=groups.device)
    step = max(1, _MAX_HELD // (shape[0] * per_tile * shape[2]))
    for first in range(0, view.num_tiles, step):
        num_tiles = min(step, view.num_tiles - first)
        estimates = limits.new_empty(shape[0], num_tiles, per_tile, shape[2])
        _estimate(view, probe, groups, estimates, first)
        _near_kernel[(num_tiles, shape[0])](
            estimates,
            limits[:, first:],
            limits.stride(0),
            is_kept[:, first:].view(torch.uint8),
            is_kept.stride(0),
            view.first_block + first,
            probe.reach,
            per_tile,
            **row_of(shape[2]),
        )
    return is_kept


def _group_means(view: PrefillView, probe: Probe) -> torch.Tensor:
    """[Hkv, M * groups, D] means of groups of keys, as precise as the queries."""
    num_heads, head_dim = view.keys.shape[2:]
    num_groups = view.num_blocks * probe.groups
    means = view.query.new_empty(num_heads, num_groups, head_dim)
    _group_means_kernel[(view.num_blocks, num_heads)](
        view.keys,
        *view.keys.stride()[:3],
        view.pages,
        means,
        GROUPS=probe.groups,
        SIZE=view.block_size // probe.groups,
        HEAD_DIM=head_dim,
        CHANNELS=triton.next_power_of_2(head_dim),
        num_warps=4,
    )
    return means


def _highest_in_full(view: PrefillView, probe: Probe, per_tile: int) -> torch.Tensor:
    """[Hkv, N, G * rows] float32, largest score of a row in its own and the first block."""
    limits = view.query.new_empty(view.num_kv_heads, view.num_tiles, per_tile, dtype=torch.float32)
    _highest_kernel[(view.num_tiles, view.num_kv_heads)](
        **_rows(view, probe),
        keys=view.keys,
        key_page_stride=view.keys.stride(0),
        key_slot_stride=view.keys.stride(1),
        key_head_stride=view.keys.stride(2),
        pages=view.pages,
        limits=limits,
        position=view.position,
        PER_TILE=per_tile,
        ROWS=max(16, triton.next_power_of_2(per_tile)),
        SLOTS=_SLOTS,
        num_warps=4,
    )
    return limits


def _estimate(
    view: PrefillView, probe: Probe, groups: torch.Tensor, estimates: torch.Tensor, tile: int
) -> None:
    num_heads, num_tiles, per_tile, num_blocks = estimates.shape
    grid = (
        triton.cdiv(groups.shape[1], _GROUPS),
        triton.cdiv(num_tiles * per_tile, _ROWS),
        num_heads,
    )
    _estimate_kernel[grid](
        **_rows(view, probe),
        groups=groups,
        groups_head=groups.stride(0),
        estimates=estimates,
        first_tile=tile,
        first_block=view.first_block,
        num_probed=num_tiles * per_tile,
        num_blocks=num_blocks,
        PER_TILE=per_tile,
        PER_BLOCK=probe.groups,
        ROWS=_ROWS,
        GROUPS=_GROUPS,
        num_warps=8,
    )


def _rows(view: PrefillView, probe: Probe) -> dict[str, Any]:
    """What says where probed rows lie."""
    query = row_major(view.query)
    return {
        "query": query,
        "query_row_stride": query.stride(0),
        "query_head_stride": query.stride(1),
        "scale": view.scale,
        "num_rows": view.num_rows,
        "PROBES": probe.rows,
        "TILE": view.block_size,
        "HEAD_DIM": query.shape[2],
        "CHANNELS": max(16, triton.next_power_of_2(query.shape[2])),
    }


@triton.jit
def _group_means_kernel(
    keys, page_stride, slot_stride, head_stride, pages, means,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Means of one block's groups."""
    block, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    group, channels = tl.arange(0, GROUPS), tl.arange(0, CHANNELS)
    mask = channels[None, :] < HEAD_DIM
    page = tl.load(pages + block).to(tl.int64)
    first = keys + page * page_stride + head * head_stride
    first += (group * SIZE)[:, None] * slot_stride + channels
    total = tl.zeros([GROUPS, CHANNELS], tl.float32)
    for place in range(SIZE):
        total += tl.load(first + place * slot_stride, mask=mask, other=0.0).to(tl.float32)
    at = ((head * tl.num_programs(0) + block) * GROUPS + group)[:, None] * HEAD_DIM + channels
    tl.store(means + at, (total / SIZE).to(means.dtype.element_ty), mask=mask)


@triton.jit
def _probed_rows(
    tile, place, is_probed, query, row_stride, head_stride, head, num_rows,
    GROUP: tl.constexpr, PROBES: tl.constexpr, TILE: tl.constexpr, HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Places in the view and values of the rows at places of tiles, by head of the group first.

    Rows are spread evenly; instead of one that a tile lacks stands the last there is.
    """
    step = place % PROBES
    row = tl.minimum(tile * TILE + (2 * step + 1) * TILE // (2 * PROBES), num_rows - 1)
    channels = tl.arange(0, CHANNELS)
    at = row.to(tl.int64) * row_stride + (head * GROUP + place // PROBES) * head_stride
    mask = is_probed[:, None] & (channels < HEAD_DIM)
    return row, tl.load(query + at[:, None] + channels, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["num_rows", "position"])
def _highest_kernel(
    query, query_row_stride, query_head_stride,
    keys, key_page_stride, key_slot_stride, key_head_stride, pages, limits, scale,
    num_rows, position,
    PER_TILE: tl.constexpr, PROBES: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    SLOTS: tl.constexpr, HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Largest score of the probed rows of one tile in their own block and in the first."""
    tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    place, channels = tl.arange(0, ROWS), tl.arange(0, CHANNELS)
    is_probed = place < PER_TILE
    row, left = _probed_rows(
        tile, place, is_probed, query, query_row_stride, query_head_stride, head, num_rows,
        PER_TILE // PROBES, PROBES, TILE, HEAD_DIM, CHANNELS,
    )  # fmt: skip
    own = position // TILE + tile
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    for which in tl.static_range(2):
        block = own * which
        page = tl.load(pages + block).to(tl.int64)
        first = keys + page * key_page_stride + head * key_head_stride
        for start in range(0, TILE, SLOTS):
            slot = start + tl.arange(0, SLOTS)
            mask = (slot < TILE)[:, None] & (channels < HEAD_DIM)
            pointers = first + slot[:, None] * key_slot_stride + channels
            right = tl.load(pointers, mask=mask, other=0.0).to(left.dtype)
            scores = tl.dot(left, tl.trans(right), input_precision="tf32x3")
            is_seen = (block * TILE + slot)[None, :] <= (position + row)[:, None]
            is_seen &= (slot < TILE)[None, :]
            highest = tl.maximum(highest, tl.max(tl.where(is_seen, scores, float("-inf")), 1))
    at = (head * tl.num_programs(0) + tile) * PER_TILE + place
    tl.store(limits + at, highest * scale, mask=is_probed)


@triton.jit(do_not_specialize=["num_rows", "first_tile", "first_block", "num_probed", "num_blocks"])
def _estimate_kernel(
    query, query_row_stride, query_head_stride, groups, groups_head, estimates, scale,
    num_rows, first_tile, first_block, num_probed, num_blocks,
    PER_TILE: tl.constexpr, PER_BLOCK: tl.constexpr, PROBES: tl.constexpr, TILE: tl.constexpr,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """[ROWS, blocks] largest score of each row in some blocks, by their groups."""
    BLOCKS: tl.constexpr = GROUPS // PER_BLOCK
    chunk, head = tl.program_id(0), tl.program_id(2).to(tl.int64)
    last = tl.minimum((tl.program_id(1) + 1) * ROWS, num_probed) - 1
    if chunk * BLOCKS > first_block + first_tile + last // PER_TILE:
        return
    place = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    group, channels = chunk * GROUPS + tl.arange(0, GROUPS), tl.arange(0, CHANNELS)
    _, left = _probed_rows(
        first_tile + place // PER_TILE, place % PER_TILE, place < num_probed, query,
        query_row_stride, query_head_stride, head, num_rows,
        PER_TILE // PROBES, PROBES, TILE, HEAD_DIM, CHANNELS,
    )  # fmt: skip
    right = tl.load(
        groups + head * groups_head + group[:, None] * HEAD_DIM + channels,
        mask=(group < num_blocks * PER_BLOCK)[:, None] & (channels < HEAD_DIM), other=0.0,
    )  # fmt: skip
    scores = tl.dot(left, tl.trans(right), input_precision="tf32x3") * scale
    highest = tl.max(tl.reshape(scores, [ROWS, BLOCKS, PER_BLOCK]), 2)
    block = chunk * BLOCKS + tl.arange(0, BLOCKS)
    at = (head * num_probed + place)[:, None] * num_blocks + block[None, :]
    mask = (place < num_probed)[:, None] & (block < num_blocks)[None, :]
    tl.store(estimates + at, highest, mask=mask)


@triton.jit(do_not_specialize=["first_block", "num_rows", "num_columns"])
def _near_kernel(
    estimates, limits, limits_head, is_kept, kept_head, first_block, reach, num_rows, num_columns,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Blocks of one tile that any probed row of the group wants."""
    tile, head, num_tiles = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    columns = tl.arange(0, BLOCK)
    own = first_block + tile
    is_estimated = (columns > 0) & (columns < own)
    wanted = ((columns == 0) | (columns == own)).to(tl.int32)
    for row in range(num_rows):
        at = ((head * num_tiles + tile) * num_rows + row) * num_columns + columns
        estimate = tl.load(estimates + at, mask=is_estimated, other=float("-inf"))
        limit = tl.load(limits + head * limits_head + tile * num_rows + row)
        highest = tl.maximum(tl.max(estimate, 0), limit)
        wanted |= (estimate > highest + reach).to(tl.int32)
    at = head * kept_head + tile * num_columns + columns
    tl.store(is_kept + at, (wanted != 0).to(tl.uint8), mask=columns < num_columns)
