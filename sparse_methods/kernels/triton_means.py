"""Means of a tile's rows and of a block's keys, in Triton."""

import torch
import triton
import triton.language as tl

from sparse_methods.views import PageSummaries, PrefillView

_ROWS = 32  # that are added up at once


def tile_means(view: PrefillView) -> torch.Tensor:
    """[Hkv, G, N, D] float32, mean of each tile's rows."""
    query = row_major(view.query)
    num_rows, num_heads, head_dim = query.shape
    means = query.new_empty(num_heads, view.num_tiles, head_dim, dtype=torch.float32)
    _tile_means_kernel[(num_heads, view.num_tiles)](
        query,
        *query.stride()[:2],
        means,
        num_rows,
        TILE=view.block_size,
        ROWS=_ROWS,
        HEAD_DIM=head_dim,
        CHANNELS=triton.next_power_of_2(head_dim),
        num_warps=4,
    )
    return means.view(view.num_kv_heads, -1, *means.shape[1:])


def block_means(view: PrefillView, summaries: PageSummaries) -> torch.Tensor:
    """``PrefillView.block_means``."""
    num_heads, head_dim = view.keys.shape[2:]
    means = summaries.total.new_empty(num_heads, view.num_blocks, head_dim)
    _block_means_kernel[(num_heads, view.num_blocks)](
        summaries.total,
        view.keys,
        *view.keys.stride()[:3],
        view.pages,
        means,
        view.kv_len,
        PAGE=view.block_size,
        ROWS=_ROWS,
        HEAD_DIM=head_dim,
        CHANNELS=triton.next_power_of_2(head_dim),
        num_warps=1,
    )
    return means


def row_major(query: torch.Tensor) -> torch.Tensor:
    """The rows with the channels of a head side by side, as kernels read them."""
    return query if query.stride(2) == 1 else query.contiguous()


@triton.jit
def _sum_of_rows(
    rows, row_stride, num_rows, HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr
):
    """[CHANNELS] float32 sum of so many rows."""
    channels = tl.arange(0, CHANNELS)
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    for start in range(0, num_rows, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < num_rows)[:, None] & (channels < HEAD_DIM)
        total += tl.load(rows + row[:, None] * row_stride + channels, mask=mask, other=0.0).to(
            tl.float32
        )
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["num_rows"])
def _tile_means_kernel(
    query, row_stride, head_stride, means, num_rows,
    TILE: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    head, tile = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    count = tl.minimum(num_rows - tile * TILE, TILE)
    rows = query + tile * TILE * row_stride + head * head_stride
    total = _sum_of_rows(rows, row_stride, count, HEAD_DIM, CHANNELS, ROWS)
    channels = tl.arange(0, CHANNELS)
    at = (head * tl.num_programs(1) + tile) * HEAD_DIM + channels
    tl.store(means + at, total / count, mask=channels < HEAD_DIM)


@triton.jit(do_not_specialize=["kv_len"])
def _block_means_kernel(
    totals, keys, page_stride, slot_stride, head_stride, pages, means, kv_len,
    PAGE: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A full block's mean is that of its summary; the last may have fewer keys than its page."""
    head, block, num_blocks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    channels = tl.arange(0, CHANNELS)
    is_channel = channels < HEAD_DIM
    page = tl.load(pages + block).to(tl.int64)
    count = tl.minimum(kv_len - block * PAGE, PAGE)
    is_full = count == PAGE
    first_key = keys + page * page_stride + head * head_stride
    num_added = tl.where(is_full, 0, count)
    added = _sum_of_rows(first_key, slot_stride, num_added, HEAD_DIM, CHANNELS, ROWS)
    at = (page * tl.num_programs(0) + head) * HEAD_DIM + channels
    total = tl.where(is_full, tl.load(totals + at, mask=is_channel, other=0.0), added)
    at = (head * num_blocks + block) * HEAD_DIM + channels
    tl.store(means + at, total / count, mask=is_channel)
