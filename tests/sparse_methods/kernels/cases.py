"""Packed batches of prompts on shuffled pages, to compare implementations of the operation."""

from dataclasses import replace

import torch

from sparse_methods.kernels.operation import (
    AttentionInputs,
    BlockLists,
    PageTable,
    QueryTiles,
    Tile,
    visible_blocks,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def cut(requests, block_size):
    """Tiles of (start, stop) chunks of prompts."""
    tiles, row = [], 0
    for index, (start, stop) in enumerate(requests):
        position = start
        while position < stop:
            end = min((position // block_size + 1) * block_size, stop)
            tiles.append(Tile(row, end - position, position, index, is_decode=False))
            row += end - position
            position = end
    return QueryTiles(tuple(tiles), block_size, DEVICE)


def build(geometry, requests, block_size=16, dtype=torch.float32, junk=float("nan")):
    """A batch of (start, stop) chunks; slots behind a request's last key hold ``junk``."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE, dtype)  # noqa: E731
    num_pages = [-(-stop // block_size) for _, stop in requests]
    order = torch.randperm(sum(num_pages), generator=generator)
    table = torch.zeros(len(requests), max(num_pages), dtype=torch.int64)
    for index, count in enumerate(num_pages):
        table[index, :count] = order[sum(num_pages[:index]) :][:count]
    slots = sum(num_pages), block_size, geometry.num_kv_heads
    keys, values = draw(*slots, geometry.head_dim), draw(*slots, geometry.value_dim)
    for row, (_, stop) in zip(table.tolist(), requests, strict=True):
        if stop % block_size:
            keys[row[stop // block_size], stop % block_size :] = junk
            values[row[stop // block_size], stop % block_size :] = junk
    tiles = cut(requests, block_size)
    last = tiles.tiles[-1]
    return AttentionInputs(
        query=draw(last.first_row + last.num_rows, geometry.num_heads, geometry.head_dim),
        keys=keys,
        values=values,
        page_table=PageTable(table.to(DEVICE)),
        tiles=tiles,
        geometry=geometry,
        sinks=draw(geometry.num_heads) if geometry.has_sinks else None,
    )


def lists_of(inputs, choose):
    """Lists from ``choose(tile index, kv head, visible blocks)``; None reads all."""
    first, last = (t.tolist() for t in visible_blocks(inputs.tiles, inputs.geometry))
    heads = range(inputs.geometry.num_kv_heads)
    chosen = [
        [choose(tile, head, list(range(first[tile], last[tile] + 1))) for head in heads]
        for tile in range(len(first))
    ]
    capacity = max(len(blocks or []) for row in chosen for blocks in row) + 1
    indices = torch.full((len(first), len(heads), capacity), 999, dtype=torch.int32)
    counts = torch.full((len(first), len(heads)), -1, dtype=torch.int32)
    for tile, row in enumerate(chosen):
        for head, blocks in enumerate(row):
            if blocks is not None:
                indices[tile, head, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
                counts[tile, head] = len(blocks)
    return BlockLists(indices.to(DEVICE), counts.to(DEVICE))


def on_float32(inputs):
    """The same batch for the reference, which knows no other precision."""
    values = {name: getattr(inputs, name) for name in ("query", "keys", "values", "sinks")}
    return replace(inputs, **{k: v if v is None else v.float() for k, v in values.items()})
