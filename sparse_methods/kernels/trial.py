"""A prompt of zeros, to compile kernels with before a request has to wait for that."""

from dataclasses import replace

import torch

from sparse_methods.kernels.operation import (
    AttentionInputs,
    BlockLists,
    LayerGeometry,
    PageTable,
    QueryTiles,
    Tile,
)


def zeros(
    geometry: LayerGeometry,
    dtype: torch.dtype,
    device: torch.device,
    num_rows: int,
    block_size: int,
) -> AttentionInputs:
    """One dense prompt."""
    tiles = tuple(
        Tile(row, min(block_size, num_rows - row), row, 0, is_decode=False)
        for row in range(0, num_rows, block_size)
    )

    def new(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    slots = len(tiles), block_size, geometry.num_kv_heads
    return AttentionInputs(
        query=new(num_rows, geometry.num_heads, geometry.head_dim),
        keys=new(*slots, geometry.head_dim),
        values=new(*slots, geometry.value_dim),
        page_table=PageTable(torch.arange(len(tiles), device=device)[None]),
        tiles=QueryTiles(tiles, block_size, device),
        geometry=geometry,
    )


def with_lists(inputs: AttentionInputs) -> AttentionInputs:
    """The same work, of which a kernel learns from lists: each says that a tile reads all."""
    counts = inputs.tiles.positions.new_full(
        (len(inputs.tiles.tiles), inputs.geometry.num_kv_heads), -1, dtype=torch.int32
    )
    return replace(inputs, lists=BlockLists(counts[..., None].clone(), counts))


def with_thresholds(inputs: AttentionInputs) -> AttentionInputs:
    """The same work with a threshold for each tile."""
    logs = inputs.tiles.positions.new_full((len(inputs.tiles.tiles),), -1.0, dtype=torch.float32)
    return replace(inputs, log_thresholds=logs)
