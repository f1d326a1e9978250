"""PyTorch's FlexAttention as a peer: the blocks that a prompt reads, in its compiled kernel."""

from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from benchmarks.cuda_timing import Run
from sparse_methods.kernels.operation import AttentionInputs


def contender(inputs: AttentionInputs) -> Run:
    """What computes one whole prompt, dense or by its lists; keys and values lie side by side."""
    pages, geometry = inputs.page_table.pages[0], inputs.geometry
    query, keys, values = (
        rows.transpose(0, 1)[None].contiguous()
        for rows in (inputs.query, *(c[pages].flatten(0, 1) for c in (inputs.keys, inputs.values)))
    )
    mask = block_mask(inputs)
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(
        query, keys, values, block_mask=mask, scale=geometry.scale, enable_gqa=True
    )


def block_mask(inputs: AttentionInputs) -> BlockMask:
    """The blocks that each tile reads: before its own whole, its own up to the diagonal."""
    tile = torch.arange(len(inputs.tiles.tiles), device=inputs.query.device)[:, None]
    block = tile.T
    is_read = (block <= tile)[None]  # [heads or 1, tiles, blocks]
    if inputs.lists is not None:
        listed = torch.zeros_like(is_read).repeat(inputs.geometry.num_kv_heads, 1, 1)
        indices, counts = (t.transpose(0, 1) for t in (inputs.lists.indices, inputs.lists.counts))
        is_entry = torch.arange(indices.shape[2], device=tile.device) < counts[..., None]
        head, row, entry = is_entry.nonzero(as_tuple=True)
        listed[head, row, indices[head, row, entry].long()] = True
        listed |= counts[..., None] < 0  # a tile without a list reads everything
        is_read = (listed & is_read).repeat_interleave(inputs.geometry.group_size, 0)
    return BlockMask.from_kv_blocks(
        *_listed(is_read & (block == tile)),
        *_listed(is_read & (block < tile)),
        BLOCK_SIZE=inputs.tiles.block_size,
        mask_mod=_causal,
    )


def _listed(is_read: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[1, H, N] numbers of the blocks and [1, H, N, N] the blocks, those that are read first."""
    order = is_read.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return is_read.sum(-1, dtype=torch.int32)[None], order.to(torch.int32)[None]


def _causal(
    _batch: torch.Tensor, _head: torch.Tensor, row: torch.Tensor, key: torch.Tensor
) -> torch.Tensor:
    return row >= key
