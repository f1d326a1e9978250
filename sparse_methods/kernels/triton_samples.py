"""Attention of some rows of each query tile: by block, by column and by diagonal, in Triton.

A tile's sample is its last row and every ``stride``-th before it. Three launches: the first holds
sampled rows and walks over keys, and writes sums of exp(score - the highest of the block); the
second brings them to one scale; the third, when each row's normaliser is known, adds columns or
diagonals up over the sampled rows and a group's heads. It computes the scores again, which costs
less than to write and read them: what lies in memory has a value per tile and key, not per row.
The step-th row before the last meets a diagonal ``step * stride`` keys earlier than the last does,
in every tile, so a program adds up diagonals by shifting the keys that it reads.
Blocks are cut at fixed numbers and sums over all keys are exact or in an order that zeros behind
them leave alone: a tile of a chunk is estimated as in the whole prompt, to the last bit.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton

from sparse_methods.kernels import triton_sample_kernels as kernels
from sparse_methods.kernels.triton_lists import row_of
from sparse_methods.kernels.triton_means import row_major
from sparse_methods.views import PrefillView

_CELLS = 1 << 14  # scores that a program holds
_ROWS = 128  # sampled rows of a program, of any tiles and heads
_LINE_ROWS = 128  # of a program that adds lines up
_LEAST_ROWS = 64  # of the same: with fewer, other instructions multiply and round otherwise
_ROW_BYTES = 1 << 15  # that these are together
_BLOCK_BYTES = 1 << 16  # of a block's keys that fit beside them
_SPAN = 16  # blocks that a program walks over
_LINES = 128  # columns or diagonals of a program
_OWN_SLOTS = 64  # keys of the own block that rows are multiplied with at once
_MAX_HELD = 1 << 26  # values between two launches: 256 MiB


@dataclass(frozen=True)
class Sample:
    """What the sampled rows of all tiles look at.

    Attributes:
        stride: Distance of the rows, tokens.
        mass: [Hkv, G, N, M] float32, mean over a tile's rows of their attention to each block.
        norms: [Hkv, G, N, S] float32, log of the sum of a row's exponentials, from the last row of
            the tile backwards; inf for rows that it lacks.
    """

    stride: int
    mass: torch.Tensor
    norms: torch.Tensor

    def without(self, is_left_out: torch.Tensor) -> "Sample":
        """The same, but lines leave out the heads and tiles of [Hkv, G, N, 1] bool."""
        return replace(self, norms=self.norms.masked_fill(is_left_out, float("inf")))


@dataclass(frozen=True)
class Choice:
    """Keys that lines are added up over.

    Attributes:
        first: First blocks of the sequence that are left out.
        recent: Most recent blocks of a tile, its own included, that are left out.
    """

    first: int = 0
    recent: int = 0


def can_sample(view: PrefillView) -> bool:
    """Whether programs hold the keys of a block."""
    size: int = _slots(view) * _row_bytes(view)
    return size <= _BLOCK_BYTES


def sample(view: PrefillView, stride: int) -> Sample:
    """The attention of every tile's sampled rows to blocks."""
    group = view.query.shape[1] // view.num_kv_heads
    shape = (view.num_kv_heads, group, view.num_tiles)
    norms = view.query.new_full(
        (*shape, triton.cdiv(view.block_size, stride)), float("inf"), dtype=torch.float32
    )
    mass = norms.new_empty(*shape, view.num_blocks)
    sampled = Sample(stride, mass, norms)
    held = 2 * view.num_kv_heads * group * norms.shape[-1] * view.num_blocks
    step = max(1, _MAX_HELD // held)
    for first in range(0, view.num_tiles, step):
        _sample_tiles(view, sampled, first, min(step, view.num_tiles - first))
    return sampled


def own_means(view: PrefillView, stride: int) -> torch.Tensor:
    """[Hkv, G, N] float32, mean score of sampled rows with the keys they see of their own block."""
    group = view.query.shape[1] // view.num_kv_heads
    shape = (view.num_kv_heads, group, view.num_tiles)
    means = view.query.new_empty(shape, dtype=torch.float32)
    num_samples = triton.cdiv(view.block_size, stride)
    kernels.own_means_kernel[(view.num_tiles, view.query.shape[1])](
        **_tensors(view),
        means=means,
        num_rows=view.num_rows,
        first_block=view.first_block,
        GROUP=group,
        STRIDE=stride,
        TILE=view.block_size,
        ROWS=max(16, triton.next_power_of_2(num_samples)),
        SLOTS=min(_OWN_SLOTS, _slots(view)),
        num_warps=4,
    )
    return means


def lines_at_once(view: PrefillView) -> int:
    """Tiles of which columns or diagonals together take a bounded memory."""
    return max(1, _MAX_HELD // (view.num_kv_heads * view.num_blocks * view.block_size))


def columns(view: PrefillView, sampled: Sample, tiles: range, choice: Choice) -> torch.Tensor:
    """[Hkv, n, keys up to the last tile's block] float32 attention to each key.

    It is the mean over a tile's sampled rows and a group's heads; arbitrary behind the tile's own
    block.
    """
    return _add_up(view, sampled, tiles, choice, shift=0)


def diagonals(view: PrefillView, sampled: Sample, tiles: range, choice: Choice) -> torch.Tensor:
    """Attention along diagonals, as ``columns`` and at the key that the tile's last row meets."""
    return _add_up(view, sampled, tiles, choice, shift=sampled.stride)


def _sample_tiles(view: PrefillView, sampled: Sample, first_tile: int, num_tiles: int) -> None:
    group, num_samples = sampled.norms.shape[1], sampled.norms.shape[3]
    num_blocks = view.first_block + first_tile + num_tiles
    num_places = num_tiles * group * num_samples
    weights = sampled.mass.new_empty(view.num_kv_heads, num_blocks, num_places)
    maxima = torch.empty_like(weights)
    slots = _slots(view)
    rows = max(16, min(_ROWS, _ROW_BYTES // _row_bytes(view), _CELLS // slots))
    grid = (triton.cdiv(num_blocks, _SPAN), triton.cdiv(num_places, rows), view.num_kv_heads)
    shape: dict[str, Any] = {
        "num_rows": view.num_rows,
        "first_tile": first_tile,
        "first_block": view.first_block,
        "GROUP": group,
        "SAMPLES": num_samples,
        "STRIDE": sampled.stride,
        "TILE": view.block_size,
    }
    kernels.block_sums_kernel[grid](
        **_tensors(view),
        weights=weights,
        maxima=maxima,
        num_places=num_places,
        num_blocks=num_blocks,
        **shape,
        ROWS=rows,
        SLOTS=slots,
        SPAN=_SPAN,
        num_warps=8,
        num_stages=_stages(view),
    )
    kernels.finish_kernel[(num_tiles, view.num_kv_heads * group)](
        weights,
        maxima,
        sampled.mass,
        sampled.norms,
        num_places=num_places,
        num_blocks=num_blocks,
        all_tiles=view.num_tiles,
        **shape,
        **row_of(view.num_blocks),
    )


def _add_up(
    view: PrefillView, sampled: Sample, tiles: range, choice: Choice, shift: int
) -> torch.Tensor:
    """Sums of lines of which a row ``stride`` earlier meets a key ``shift`` earlier."""
    group, num_samples = sampled.norms.shape[1], sampled.norms.shape[3]
    num_lines = (view.first_block + tiles.stop) * view.block_size
    sums = view.query.new_empty(view.num_kv_heads, len(tiles), num_lines, dtype=torch.float32)
    members = triton.next_power_of_2(group)
    rows = max(members, min(_LINE_ROWS, _ROW_BYTES // _row_bytes(view)))
    rows = min(rows, max(_LEAST_ROWS, members * triton.next_power_of_2(len(tiles))))
    grid = (
        triton.cdiv(num_lines, _LINES),
        triton.cdiv(len(tiles), rows // members),
        view.num_kv_heads,
    )
    kernels.lines_kernel[grid](
        **_tensors(view),
        norms=sampled.norms,
        sums=sums,
        num_rows=view.num_rows,
        first_tile=tiles.start,
        first_block=view.first_block,
        num_tiles=len(tiles),
        all_tiles=view.num_tiles,
        num_lines=num_lines,
        first_choice=choice.first,
        recent=choice.recent,
        GROUP=group,
        MEMBERS=members,
        SAMPLES=num_samples,
        STRIDE=sampled.stride,
        SHIFT=shift,
        TILE=view.block_size,
        ROWS=rows,
        LINES=_LINES,
        num_warps=8 if rows > _LEAST_ROWS or _stages(view) == 1 else 4,
        num_stages=_stages(view),
    )
    return sums


def _slots(view: PrefillView) -> int:
    size: int = triton.next_power_of_2(view.block_size)
    return max(16, size)


def _row_bytes(view: PrefillView) -> int:
    size: int = max(16, triton.next_power_of_2(view.keys.shape[3])) * view.keys.element_size()
    return size


def _stages(view: PrefillView) -> int:
    """Of loads that are under way: keys in float32 need the room for their parts."""
    return 2 if view.keys.element_size() < 4 else 1


def _tensors(view: PrefillView) -> dict[str, Any]:
    """Where rows and keys lie."""
    query = row_major(view.query)
    return {
        "query": query,
        "query_row": query.stride(0),
        "query_head": query.stride(1),
        "keys": view.keys,
        "key_page": view.keys.stride(0),
        "key_slot": view.keys.stride(1),
        "key_head": view.keys.stride(2),
        "pages": view.pages,
        "scale": view.scale,
        "kv_len": view.kv_len,
        "HEAD_DIM": query.shape[2],
        "CHANNELS": max(16, triton.next_power_of_2(query.shape[2])),
    }
