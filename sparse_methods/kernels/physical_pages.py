"""What a kernel of another library needs of our pages: lists of physical ones, and clean ends.

A library that reads the whole cache as one sequence of keys knows nothing of requests. Lists that
name physical pages make it read those of one request, in place.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sparse_methods.kernels.operation import AttentionInputs, TileRun

_ENTRIES = 256  # of a list that are translated at once
_SLOTS = 32  # of a page that are cleared at once


@dataclass(frozen=True)
class PhysicalLists:
    """Physical pages of a run of n tiles, per query head; own pages stand apart.

    Attributes:
        pages: [1, Hq, n, M] int32, pages that lie before the tile, in the lists' order.
        counts: [1, Hq, n] int32 entries of ``pages`` in use.
        own_pages: [1, Hq, n, 1] int32, the page with the tile's own keys.
        own_counts: [1, Hq, n] int32, 1 if the tile reads that page, else 0.
    """

    pages: torch.Tensor
    counts: torch.Tensor
    own_pages: torch.Tensor
    own_counts: torch.Tensor


def physical_lists(inputs: AttentionInputs, run: TileRun, blocks: torch.Tensor) -> PhysicalLists:
    """Translate the lists of a run; causality is the only thing that hides a block.

    Args:
        inputs: Has lists; a tile whose count is -1 reads every block up to its own.
        run: The tiles to translate.
        blocks: [N, Hq, 3] int64, receives the number of blocks selected of these tiles.
    """
    lists, geometry = inputs.lists, inputs.geometry
    assert lists is not None
    num_blocks = -(-run.kv_len // inputs.tiles.block_size)
    shape = (1, geometry.num_heads, run.num_tiles)
    new = inputs.page_table.pages.new_empty
    counts, own_counts = new(shape, dtype=torch.int32), new(shape, dtype=torch.int32)
    pages = new((*shape, num_blocks), dtype=torch.int32)
    own_pages = new((*shape, 1), dtype=torch.int32)
    _translate[(run.num_tiles, geometry.num_kv_heads)](
        lists.indices,
        lists.counts,
        inputs.page_table.pages[run.request],
        pages,
        counts,
        own_pages,
        own_counts,
        blocks,
        run.first_tile,
        run.position // inputs.tiles.block_size,
        num_blocks,
        *lists.indices.stride()[:2],
        *lists.counts.stride(),
        GROUP=geometry.group_size,
        ENTRIES=_ENTRIES,
        num_warps=4,
    )
    return PhysicalLists(pages, counts, own_pages, own_counts)


def clear_tails(inputs: AttentionInputs) -> None:
    """Zero the values behind the last key of each request with prompt tiles, which nobody wrote.

    A kernel that hides such slots by a weight of 0 would make NaN of what is not finite there.
    """
    tiles, values = inputs.tiles, inputs.values
    if not len(tiles.tail_indices):
        return
    _clear[(len(tiles.tail_indices), values.shape[2])](
        values,
        tiles.table,
        tiles.tail_indices,
        inputs.page_table.pages,
        inputs.page_table.pages.stride(0),
        *values.stride()[:3],
        BLOCK=tiles.block_size,
        DIM=values.shape[3],
        PADDED_DIM=triton.next_power_of_2(values.shape[3]),
        SLOTS=min(_SLOTS, tiles.block_size),
        num_warps=4,
    )


@triton.jit(
    do_not_specialize=[
        "first_tile", "first_block", "num_blocks",
        "indices_tile", "indices_head", "counts_tile", "counts_head",
    ]
)  # fmt: skip
def _translate(
    indices, lengths, page_row, pages, counts, own_pages, own_counts, blocks,
    first_tile, first_block, num_blocks, indices_tile, indices_head, counts_tile, counts_head,
    GROUP: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """The list of one tile and KV head, for all query heads of the group."""
    place, kv_head = tl.program_id(0), tl.program_id(1)
    num_tiles, num_heads = tl.num_programs(0), tl.num_programs(1) * GROUP
    tile = (first_tile + place).to(tl.int64)
    own = first_block + place
    length = tl.load(lengths + tile * counts_tile + kv_head * counts_head)
    listed = indices + tile * indices_tile + kv_head * indices_head
    num_entries = tl.where(length < 0, own + 1, length)
    num_before = own * 0
    reads_own = own * 0
    for start in range(0, num_entries, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        in_use = entry < num_entries
        block = tl.load(listed + entry, mask=entry < length, other=-1)
        block = tl.where(length < 0, entry, block)
        is_before = (in_use & (block >= 0) & (block < own)).to(tl.int32)
        at = num_before + tl.cumsum(is_before, 0) - 1
        page = tl.load(page_row + block, mask=is_before > 0, other=0).to(tl.int32)
        for member in tl.static_range(GROUP):
            row = ((kv_head * GROUP + member) * num_tiles + place).to(tl.int64)
            tl.store(pages + row * num_blocks + at, page, mask=is_before > 0)
        num_before += tl.sum(is_before, 0)
        reads_own = tl.maximum(reads_own, tl.max((in_use & (block == own)).to(tl.int32), 0))
    own_page = tl.load(page_row + own).to(tl.int32)
    for member in tl.static_range(GROUP):
        head = kv_head * GROUP + member
        row = head * num_tiles + place
        tl.store(counts + row, num_before)
        tl.store(own_pages + row, own_page)
        tl.store(own_counts + row, reads_own)
        tl.store(blocks + (tile * num_heads + head) * 3 + 1, (num_before + reads_own).to(tl.int64))


@triton.jit(do_not_specialize=["pages_request"])
def _clear(
    values, table, tails, pages, pages_request, stride_page, stride_slot, stride_head,
    BLOCK: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The end of the page in which the last tile of one request ends, of one KV head."""
    tile = tl.load(tails + tl.program_id(0))
    kv_len = tl.load(table + tile * 4 + 1) + tl.load(table + tile * 4 + 2)
    request = tl.load(table + tile * 4 + 3)
    page = tl.load(pages + request * pages_request + (kv_len - 1) // BLOCK)
    base = values + page * stride_page + tl.program_id(1) * stride_head
    columns = tl.arange(0, PADDED_DIM)
    zeros = tl.zeros([SLOTS, PADDED_DIM], values.dtype.element_ty)
    for start in range(0, BLOCK, SLOTS):
        slots = start + tl.arange(0, SLOTS)
        is_behind = (slots > (kv_len - 1) % BLOCK)[:, None] & (columns < DIM)[None, :]
        tl.store(base + slots[:, None] * stride_slot + columns[None, :], zeros, mask=is_behind)
