"""Which blocks come near the largest score of some probed rows (``predictive_skip``), in Triton.

Two launches: the first multiplies rows with the means of groups of keys and keeps the largest score
of a block; the second compares these with the largest of the row. Scores of groups stay out of
memory.
"""

import torch
import triton
import triton.language as tl

from sparse_methods.kernels.triton_lists import row_of
from sparse_methods.views import PrefillView

_ROWS = 128  # probed rows of a program
_GROUPS = 128  # groups of keys of a program
_ROW_BYTES = 512  # of a row that fits beside the others
_MAX_HELD = 1 << 26  # estimates between the launches: 256 MiB


def can_probe(groups: torch.Tensor, per_block: int) -> bool:
    """Whether programs hold these groups [Hkv, M * per_block, D], and a block's lie in one."""
    size: int = triton.next_power_of_2(groups.shape[2]) * groups.element_size()
    return size <= _ROW_BYTES and per_block & (per_block - 1) == 0 and per_block <= _GROUPS


def near_largest(
    view: PrefillView, probes: torch.Tensor, groups: torch.Tensor, exact: torch.Tensor, reach: float
) -> torch.Tensor:
    """Blocks of which an estimate comes near the largest of a probed row.

    Args:
        view: The tiles.
        probes: [Hkv, G, N, r, D] probed rows of each tile.
        groups: [Hkv, groups, D] means of groups of keys, as many for each block.
        exact: [Hkv, G, N, r] float32 largest score of a row in its own and the first block.
        reach: What an estimate may lie above or, if negative, below the largest, nats.

    Returns:
        [Hkv, N, M] bool, of any head of the group; the own and the first block are kept.
    """
    rows = probes.transpose(1, 2).flatten(2, 3).contiguous()  # [Hkv, N, G * r, D]
    limits = exact.transpose(1, 2).contiguous()
    shape = (view.num_kv_heads, view.num_tiles, view.num_blocks)
    is_kept = torch.empty(shape, dtype=torch.bool, device=rows.device)
    step = max(1, _MAX_HELD // (shape[0] * rows.shape[2] * shape[2]))
    for first in range(0, view.num_tiles, step):
        num_tiles = min(step, view.num_tiles - first)
        estimates = limits.new_empty(shape[0], num_tiles, rows.shape[2], shape[2])
        _estimate(view, rows[:, first:], groups, estimates, first)
        _near_kernel[(num_tiles, shape[0])](
            estimates,
            limits[:, first:],
            limits.stride(0),
            is_kept[:, first:].view(torch.uint8),
            is_kept.stride(0),
            view.first_block + first,
            reach,
            rows.shape[2],
            **row_of(shape[2]),
        )
    return is_kept


def _estimate(
    view: PrefillView, rows: torch.Tensor, groups: torch.Tensor, estimates: torch.Tensor, tile: int
) -> None:
    num_heads, num_tiles, per_tile, num_blocks = estimates.shape
    grid = (
        triton.cdiv(groups.shape[1], _GROUPS),
        triton.cdiv(num_tiles * per_tile, _ROWS),
        num_heads,
    )
    _estimate_kernel[grid](
        rows,
        rows.stride(0),
        groups,
        *groups.stride()[:2],
        estimates,
        view.scale,
        view.first_block + tile,
        num_tiles * per_tile,
        num_blocks,
        PER_TILE=per_tile,
        PER_BLOCK=groups.shape[1] // num_blocks,
        ROWS=_ROWS,
        GROUPS=_GROUPS,
        HEAD_DIM=groups.shape[2],
        CHANNELS=max(16, triton.next_power_of_2(groups.shape[2])),
        num_warps=8,
    )


@triton.jit(do_not_specialize=["first_block", "num_rows", "num_blocks"])
def _estimate_kernel(
    rows, rows_head, groups, groups_head, group_stride, estimates, scale,
    first_block, num_rows, num_blocks,
    PER_TILE: tl.constexpr, PER_BLOCK: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """[ROWS, blocks] largest score of each row in some blocks, by their groups."""
    BLOCKS: tl.constexpr = GROUPS // PER_BLOCK
    chunk, head = tl.program_id(0), tl.program_id(2).to(tl.int64)
    last = tl.minimum((tl.program_id(1) + 1) * ROWS, num_rows) - 1
    if chunk * BLOCKS > first_block + last // PER_TILE:
        return
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    group = chunk * GROUPS + tl.arange(0, GROUPS)
    channels = tl.arange(0, CHANNELS)
    is_channel = channels < HEAD_DIM
    left = tl.load(
        rows + head * rows_head + row[:, None] * HEAD_DIM + channels,
        mask=(row < num_rows)[:, None] & is_channel, other=0.0,
    )  # fmt: skip
    right = tl.load(
        groups + head * groups_head + group[:, None] * group_stride + channels,
        mask=(group < num_blocks * PER_BLOCK)[:, None] & is_channel, other=0.0,
    )  # fmt: skip
    scores = tl.dot(left, tl.trans(right), input_precision="tf32x3") * scale
    highest = tl.max(tl.reshape(scores, [ROWS, BLOCKS, PER_BLOCK]), 2)
    block = chunk * BLOCKS + tl.arange(0, BLOCKS)
    at = (head * num_rows + row)[:, None] * num_blocks + block[None, :]
    mask = (row < num_rows)[:, None] & (block < num_blocks)[None, :]
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
