"""What a call of the operation read, counted in one launch, with what its thresholds dropped."""

import torch
import triton
import triton.language as tl

from sparse_methods.kernels.operation import AttentionInputs, count_selected
from sparse_methods.kernels.triton_launch import as_dependent, await_earlier
from sparse_methods.kernels.triton_prefill_kernels import first_visible
from sparse_methods.kernels.triton_workspace import Workspace

_ENTRIES = 128  # of a list that are counted at once


def count(
    inputs: AttentionInputs, workspace: Workspace | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``blocks`` and ``kv_elements`` of ``AttentionOutputs``.

    Args:
        inputs: What was computed.
        workspace: Where thresholds left what they dropped; needed if there are any.
    """
    lists, geometry, tiles = inputs.lists, inputs.geometry, inputs.tiles
    dropped = workspace if inputs.log_thresholds is not None else None
    if lists is None and dropped is None:
        return count_selected(inputs)  # the same in every layer of a kind: counted once
    num_tiles = len(tiles.tiles)
    blocks = tiles.table.new_empty(num_tiles, geometry.num_heads, 3, dtype=torch.int64)
    kv_elements = tiles.table.new_empty(num_tiles, 2, dtype=torch.int64)
    _count[(num_tiles,)](
        tiles.table,
        tiles.is_decode,
        None if lists is None else lists.indices,
        None if lists is None else lists.counts,
        None if dropped is None else dropped.skipped,
        None if dropped is None else dropped.unread_keys,
        blocks,
        kv_elements,
        *((0, 0) if lists is None else lists.indices.stride()[:2]),
        *((0, 0) if lists is None else lists.counts.stride()),
        NUM_KV_HEADS=geometry.num_kv_heads,
        GROUP=geometry.group_size,
        HEAD_DIM=geometry.head_dim,
        VALUE_DIM=geometry.value_dim,
        BLOCK=tiles.block_size,
        WINDOW=geometry.window,
        CHUNK=geometry.chunk,
        ENTRIES=_ENTRIES,
        num_warps=1,
        **as_dependent(blocks.device),
    )
    return blocks, kv_elements


@triton.jit(do_not_specialize=["indices_tile", "indices_head", "counts_tile", "counts_head"])
def _count(
    table, is_decode, indices, counts, skipped, unread_keys, blocks, kv_elements,
    indices_tile, indices_head, counts_tile, counts_head,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    ENTRIES: tl.constexpr, IS_DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One tile."""
    await_earlier(IS_DEPENDENT)
    tile = tl.program_id(0).to(tl.int64)
    position = tl.load(table + tile * 4 + 2)
    kv_len = position + tl.load(table + tile * 4 + 1)
    first, last = first_visible(position, WINDOW, CHUNK) // BLOCK, (kv_len - 1) // BLOCK
    total = last - first + 1
    num_missing = BLOCK - 1 - (kv_len - 1) % BLOCK  # keys that the last block lacks
    keys_read = total.to(tl.int64) * 0
    values_unread = total.to(tl.int64) * 0
    for kv_head in range(NUM_KV_HEADS):
        selected, reads_last = total, total * 0 + 1
        if indices is not None:
            length = tl.load(counts + tile * counts_tile + kv_head * counts_head)
            listed = indices + tile * indices_tile + kv_head * indices_head
            is_counted = tl.zeros([ENTRIES], tl.int32)
            is_last = tl.zeros([ENTRIES], tl.int32)
            for start in range(0, length, ENTRIES):
                entry = start + tl.arange(0, ENTRIES)
                block = tl.load(listed + entry, mask=entry < length, other=-1)
                is_counted += ((block >= first) & (block <= last)).to(tl.int32)
                is_last += (block == last).to(tl.int32)
            selected = tl.where(length < 0, total, tl.sum(is_counted, 0))
            reads_last = tl.where(length < 0, 1, tl.minimum(tl.sum(is_last, 0), 1))
        keys_read += selected * BLOCK - reads_last * num_missing
        if unread_keys is not None:
            values_unread += tl.load(unread_keys + tile * NUM_KV_HEADS + kv_head)
        for member in tl.static_range(GROUP):
            row = tile * (NUM_KV_HEADS * GROUP) + kv_head * GROUP + member
            num_skipped = total * 0
            if skipped is not None:
                num_skipped = tl.load(skipped + row)
            tl.store(blocks + row * 3, total.to(tl.int64))
            tl.store(blocks + row * 3 + 1, selected.to(tl.int64))
            tl.store(blocks + row * 3 + 2, num_skipped.to(tl.int64))
    is_counting = tl.load(is_decode + tile).to(tl.int64)
    keys_dense = (total * BLOCK - num_missing).to(tl.int64) * NUM_KV_HEADS
    read = keys_read * (HEAD_DIM + VALUE_DIM) - values_unread * VALUE_DIM
    tl.store(kv_elements + tile * 2, read * is_counting)
    tl.store(kv_elements + tile * 2 + 1, keys_dense * (HEAD_DIM + VALUE_DIM) * is_counting)
