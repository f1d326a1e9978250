"""Chunks of sequences become flat tensors, cut into query tiles and grouped by method."""

import math
from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
import torch

from service.engine.grouping import OwnedTile, group_adaptive, group_tiles, overrides
from service.engine.prompt_logprobs import num_prompt_rows
from service.engine.scheduler import Chunk
from service.engine.sequence import Sequence
from service.engine.transfer import to_device
from service.models.attention import AttentionBatch
from service.models.method_fault import MethodFaultError
from sparse_methods.kernels.operation import PageTable, QueryTiles, Tile
from sparse_methods.kernels.page_summary import PageSegments
from sparse_methods.statistics import PHASES


@dataclass(frozen=True)
class Batch:
    """One engine step, ready for the model.

    Attributes:
        token_ids: [T] int64 packed tokens.
        positions: [T] int64 absolute positions.
        logit_rows: [S + P] int64, packed row of each completed chunk's last token, and then those
            of prompts whose log-probabilities are reported.
        completed: The S sequences that get a next token.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    logit_rows: torch.Tensor
    completed: list[Sequence]
    attention: AttentionBatch


def build_batch(chunks: Items[Chunk], block_size: int, device: torch.device) -> Batch:
    """Pack the chunks of one step, in order."""
    tiles, owners, last_rows = [], [], []
    token_ids: list[int] = []
    prompt_rows: list[int] = []
    for request, chunk in enumerate(chunks):
        cut = cut_tiles(chunk, request, len(token_ids), block_size)
        tiles += cut
        owners += [chunk.sequence] * len(cut)
        prompt_rows += range(len(token_ids), len(token_ids) + num_prompt_rows(chunk))
        token_ids += chunk.sequence.tokens(chunk.start, chunk.stop)
        if chunk.completes:
            last_rows.append(len(token_ids) - 1)
    positions = torch.cat([torch.arange(chunk.start, chunk.stop) for chunk in chunks])
    page_table = _page_table(chunks)
    slots = torch.cat([_slots(chunk, block_size) for chunk in chunks])
    owned = [OwnedTile(*pair) for pair in zip(tiles, owners, strict=True)]
    methods = {chunk.sequence.method for chunk in chunks}
    attention = AttentionBatch(
        slot_mapping=to_device(slots, device),
        page_table=PageTable(to_device(page_table, device)),
        tiles=QueryTiles(tuple(tiles), block_size, device),
        counter_rows=_counter_rows(owned, device),
        groups=group_tiles(owned, page_table, block_size, device),
        log_thresholds=_log_thresholds(owned, device),
        adaptive=group_adaptive(owned, device),
        diagonal_first=_diagonal_first(owned, device),
        segments=(
            _segments(chunks, block_size, device)
            if any(method.uses_summaries for method in methods)
            else None
        ),
        scores_pages=any(overrides(method, "score_pages") for method in methods),
    )
    return Batch(
        token_ids=to_device(torch.from_numpy(np.array(token_ids)), device),  # fast if they are many
        positions=to_device(positions, device),
        logit_rows=to_device(last_rows + prompt_rows, device, torch.int64),
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


def _slots(chunk: Chunk, block_size: int) -> torch.Tensor:
    """[num_tokens] int64, flat slots of a chunk's tokens: by whole pages, never token by token."""
    first = chunk.start // block_size
    pages = torch.tensor(chunk.sequence.pages[first : -(-chunk.stop // block_size)])
    slots = (pages[:, None] * block_size + torch.arange(block_size)).flatten()
    offset = chunk.start - first * block_size
    return slots[offset : offset + chunk.num_tokens]


def _page_table(chunks: Items[Chunk]) -> torch.Tensor:
    width = max(len(chunk.sequence.pages) for chunk in chunks)
    return torch.tensor(
        [chunk.sequence.pages + [0] * (width - len(chunk.sequence.pages)) for chunk in chunks]
    )


def _segments(chunks: Items[Chunk], block_size: int, device: torch.device) -> PageSegments:
    pages, lengths, continues = [], [], []
    for chunk in chunks:
        for page in range(chunk.start // block_size, -(-chunk.stop // block_size)):
            start = max(chunk.start, page * block_size)
            pages.append(chunk.sequence.pages[page])
            lengths.append(min(chunk.stop, (page + 1) * block_size) - start)
            continues.append(start % block_size != 0)
    columns = (pages, lengths, continues)
    return PageSegments(*(to_device(column, device) for column in columns))


def _log_thresholds(tiles: list[OwnedTile], device: torch.device) -> torch.Tensor | None:
    values = [_log_threshold(tile) for tile in tiles]
    if all(value == -math.inf for value in values):
        return None
    return to_device(values, device, torch.float32)


def _log_threshold(tile: OwnedTile) -> float:
    if not tile.is_sparse:
        return -math.inf
    try:
        threshold = tile.owner.method.skip_threshold(tile.phase, tile.length)
    except Exception as error:
        raise MethodFaultError(tile.owner.method, tile.owner.slot) from error
    return -math.inf if threshold is None else math.log(threshold)


def _diagonal_first(tiles: list[OwnedTile], device: torch.device) -> torch.Tensor | None:
    values = [tile.owner.method.visits_diagonal_first(tile.phase) for tile in tiles]
    return to_device(values, device) if any(values) else None


def _counter_rows(tiles: list[OwnedTile], device: torch.device) -> torch.Tensor:
    rows = [(t.owner.slot or 0) * len(PHASES) + PHASES.index(t.phase) for t in tiles]
    return to_device(rows, device)
