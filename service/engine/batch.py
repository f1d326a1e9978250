"""Chunks of sequences become flat tensors, cut into query tiles and grouped by method."""

import math
from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch

from service.engine.scheduler import Chunk
from service.engine.sequence import Sequence
from service.models.attention import AttentionBatch, TileGroup
from sparse_methods.kernels.operation import PageTable, QueryTiles, Tile
from sparse_methods.method import Phase, SparseAttentionMethod
from sparse_methods.statistics import PHASES


@dataclass(frozen=True)
class Batch:
    """One engine step, ready for the model.

    Attributes:
        token_ids: [T] int64 packed tokens.
        positions: [T] int64 absolute positions.
        last_rows: [S] int64, packed row of each completed chunk's last token.
        completed: The S sequences that get a next token.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    last_rows: torch.Tensor
    completed: list[Sequence]
    attention: AttentionBatch


def build_batch(chunks: Items[Chunk], block_size: int, device: torch.device) -> Batch:
    """Pack the chunks of one step, in order."""
    tiles, owners, last_rows = [], [], []
    token_ids: list[int] = []
    for request, chunk in enumerate(chunks):
        cut = cut_tiles(chunk, request, len(token_ids), block_size)
        tiles += cut
        owners += [chunk.sequence] * len(cut)
        token_ids += chunk.sequence.tokens(chunk.start, chunk.stop)
        if chunk.completes:
            last_rows.append(len(token_ids) - 1)
    positions = torch.cat([torch.arange(chunk.start, chunk.stop) for chunk in chunks])
    page_table = _page_table(chunks)
    requests = torch.repeat_interleave(
        torch.arange(len(chunks)), torch.tensor([chunk.num_tokens for chunk in chunks])
    )
    slots = page_table[requests, positions // block_size] * block_size + positions % block_size
    attention = AttentionBatch(
        slot_mapping=slots.to(device),
        page_table=PageTable(page_table.to(device)),
        tiles=QueryTiles(tuple(tiles), block_size, device),
        groups=_group(tiles, owners, block_size, device),
        log_thresholds=_log_thresholds(tiles, owners, device),
        counter_rows=_counter_rows(tiles, owners, device),
    )
    return Batch(
        token_ids=torch.tensor(token_ids, device=device),
        positions=positions.to(device),
        last_rows=torch.tensor(last_rows, dtype=torch.int64, device=device),
        completed=[chunk.sequence for chunk in chunks if chunk.completes],
        attention=attention,
    )


def cut_tiles(chunk: Chunk, request: int, first_row: int, block_size: int) -> list[Tile]:
    """Cut a chunk at absolute multiples of the block size; generated rows stand alone.

    Args:
        chunk: Tokens [start, stop) of a sequence.
        request: Place of the chunk in the batch.
        first_row: Packed row of the chunk's first token.
        block_size: Rows of a full tile.
    """
    num_prompt = chunk.sequence.num_prompt_tokens
    tiles, position = [], chunk.start
    while position < chunk.stop:
        is_decode = position >= num_prompt
        end = position + 1
        if not is_decode:
            end = min((position // block_size + 1) * block_size, num_prompt, chunk.stop)
        row = first_row + position - chunk.start
        tiles.append(Tile(row, end - position, position, request, is_decode))
        position = end
    return tiles


def _page_table(chunks: Items[Chunk]) -> torch.Tensor:
    width = max(len(chunk.sequence.pages) for chunk in chunks)
    return torch.tensor(
        [chunk.sequence.pages + [0] * (width - len(chunk.sequence.pages)) for chunk in chunks]
    )


def _group(
    tiles: list[Tile], owners: list[Sequence], block_size: int, device: torch.device
) -> list[TileGroup]:
    """Collect the tiles of methods that select, by equal method and phase."""
    members: dict[tuple[SparseAttentionMethod, bool], list[int]] = {}
    for index, (tile, owner) in enumerate(zip(tiles, owners, strict=True)):
        if _selects(owner.method, is_decode=tile.is_decode):
            members.setdefault((owner.method, tile.is_decode), []).append(index)
    return [
        _tile_group(method, [(i, tiles[i]) for i in indices], block_size, device)
        for (method, _), indices in members.items()
    ]


def _selects(method: SparseAttentionMethod, *, is_decode: bool) -> bool:
    hook = "select_decode" if is_decode else "select_prefill"
    return getattr(type(method), hook) is not getattr(SparseAttentionMethod, hook)


def _tile_group(
    method: SparseAttentionMethod,
    members: list[tuple[int, Tile]],
    block_size: int,
    device: torch.device,
) -> TileGroup:
    tiles = [tile for _, tile in members]
    rows = [torch.arange(tile.first_row, tile.first_row + tile.num_rows) for tile in tiles]
    num_rows = torch.tensor([0] + [tile.num_rows for tile in tiles])
    blocks = [(tile.kv_len - 1) // block_size for tile in tiles]
    return TileGroup(
        method=method,
        is_decode=tiles[0].is_decode,
        tiles=torch.tensor([index for index, _ in members], device=device),
        rows=torch.cat(rows).to(device),
        offsets=num_rows.cumsum(0).to(device, torch.int32),
        blocks=torch.tensor(blocks, dtype=torch.int32, device=device),
        kv_lens=torch.tensor([t.kv_len for t in tiles], dtype=torch.int32, device=device),
        max_blocks=max(blocks) + 1,
    )


def _log_thresholds(
    tiles: list[Tile], owners: list[Sequence], device: torch.device
) -> torch.Tensor | None:
    values = [_log_threshold(tile, owner) for tile, owner in zip(tiles, owners, strict=True)]
    if all(value == -math.inf for value in values):
        return None
    return torch.tensor(values, dtype=torch.float32, device=device)


def _log_threshold(tile: Tile, owner: Sequence) -> float:
    """In prefill the whole prompt's length counts, so that chunking does not change a decision."""
    if tile.is_decode:
        threshold = owner.method.skip_threshold(Phase.DECODE, tile.kv_len)
    else:
        threshold = owner.method.skip_threshold(Phase.PREFILL, owner.num_prompt_tokens)
    return -math.inf if threshold is None else math.log(threshold)


def _counter_rows(tiles: list[Tile], owners: list[Sequence], device: torch.device) -> torch.Tensor:
    rows = []
    for tile, owner in zip(tiles, owners, strict=True):
        phase = Phase.DECODE if tile.is_decode else Phase.PREFILL
        rows.append((owner.slot or 0) * len(PHASES) + PHASES.index(phase))
    return torch.tensor(rows, device=device)
