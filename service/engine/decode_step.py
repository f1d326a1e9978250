"""A decode step whose every input lives in buffers that stay where they are.

The step is padded to a fixed number of rows, and all that differs from step to step is data: so
the same kernels can run again and again, captured once in a CUDA graph.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch

from service.engine.decode_inputs import (
    DIAGONAL_FIRST,
    METHOD,
    NUM_FIELDS,
    POSITION,
    PROMPT_LEN,
    SLOT,
    TOKEN,
    HostInputs,
)
from service.engine.grouping import overrides
from service.engine.scheduler import Chunk
from service.models.attention import AttentionBatch
from service.models.selection import DecodeGroup, ThresholdGroup
from sparse_methods.kernels.operation import PageTable, QueryTiles, Tile
from sparse_methods.kernels.page_summary import PageSegments
from sparse_methods.method import SparseAttentionMethod
from sparse_methods.statistics import PHASES
from sparse_methods.views import Phase


def is_decode_step(chunks: Items[Chunk]) -> bool:
    """Whether every chunk is one generated token."""
    return all(
        chunk.num_tokens == 1 and chunk.start >= chunk.sequence.num_prompt_tokens
        for chunk in chunks
    )


@dataclass(frozen=True)
class DecodeShape:
    """What of a decode step is fixed: one graph serves every step of this shape.

    Attributes:
        num_rows: Rows, padding included.
        num_pages: Most pages of a row.
        has_thresholds: Whether any row may skip blocks inside the softmax; lambda is data.
        has_summaries: Whether pages that are written to get summaries.
        methods: The methods that select pages or adapt thresholds for any row, in a fixed order.
    """

    num_rows: int
    num_pages: int
    has_thresholds: bool
    has_summaries: bool
    methods: tuple[SparseAttentionMethod, ...]

    @classmethod
    def of(cls, chunks: Items[Chunk]) -> "DecodeShape":
        """The smallest shape, of few, that the chunks fit into."""
        most_pages = max(len(chunk.sequence.pages) for chunk in chunks)
        longest: dict[SparseAttentionMethod, int] = {}
        for chunk in chunks:
            method = chunk.sequence.method
            longest[method] = max(longest.get(method, 0), chunk.stop)
        asked = [m for m in longest if overrides(m, "select_decode") or _is_adaptive(m)]
        # Rows below the break-even of their method read everything: nothing is chosen for them.
        in_force = [m for m in asked if longest[m] >= m.break_even(Phase.DECODE)]
        return cls(
            num_rows=_rounded(len(chunks)),
            num_pages=_rounded(most_pages),
            has_thresholds=any(overrides(method, "skip_threshold") for method in longest),
            # Of all of them: a row that grows past the break-even needs those of all its pages.
            has_summaries=any(method.uses_summaries for method in asked),
            methods=tuple(sorted(in_force, key=repr)),
        )


class DecodeStep:
    """The buffers of one shape, and the batch that reads them.

    Args:
        spare_page: Physical page that padding rows write to.
        spare_slot: Statistics slot that padding rows count in.
    """

    def __init__(
        self,
        shape: DecodeShape,
        block_size: int,
        device: torch.device,
        *,
        spare_page: int,
        spare_slot: int,
    ) -> None:
        self.shape = shape
        self._block_size = block_size
        size = (shape.num_rows, shape.num_pages)
        # Two, because the next step is described while the device may not have read this one.
        self._inputs = [
            HostInputs(
                size,
                shape.methods,
                (spare_page, spare_slot),
                is_pinned=device.type == "cuda",
            )
            for _ in range(2)
        ]
        self._fields = torch.zeros_like(self._inputs[0].fields, device=device)
        self._thresholds = torch.zeros(shape.num_rows, device=device)

    @property
    def token_ids(self) -> torch.Tensor:
        """[num_rows] int64."""
        return self._fields[:, TOKEN]

    @property
    def positions(self) -> torch.Tensor:
        """[num_rows] int64."""
        return self._fields[:, POSITION]

    def fill(self, chunks: Items[Chunk]) -> None:
        """Describe the next step; two copies to the device, which nobody waits for."""
        self._inputs.reverse()
        inputs = self._inputs[0]
        inputs.describe(chunks)
        inputs.send(self._fields, self._thresholds)

    def batch(self, tiles: tuple[Tile, ...] | None = None) -> AttentionBatch:
        """What the attention layers read: operations on the buffers, captured with the step.

        Args:
            tiles: What the host knows of the rows; None says as much as the shape does.
        """
        longest = self.shape.num_pages * self._block_size
        if tiles is None:
            tiles = tuple(
                Tile(row, 1, longest - 1, row, is_decode=True) for row in range(self.shape.num_rows)
            )
        positions, methods = self.positions, self.shape.methods
        has_thresholds = self.shape.has_thresholds
        pages = self._fields[:, NUM_FIELDS:]
        own_pages = pages.gather(1, positions[:, None] // self._block_size)[:, 0]
        offsets = positions % self._block_size
        decode_row = PHASES.index(Phase.DECODE)
        return AttentionBatch(
            slot_mapping=own_pages * self._block_size + offsets,
            page_table=PageTable(pages),
            tiles=QueryTiles.of_rows(tiles, self._block_size, positions),
            counter_rows=self._fields[:, SLOT] * len(PHASES) + decode_row,
            groups=[self._group(m) for m in methods if overrides(m, "select_decode")],
            log_thresholds=self._thresholds if has_thresholds else None,
            adaptive=[self._adaptive(m) for m in methods if _is_adaptive(m)],
            diagonal_first=self._fields[:, DIAGONAL_FIRST].bool() if has_thresholds else None,
            segments=(
                PageSegments(own_pages, torch.ones_like(own_pages), offsets > 0)
                if self.shape.has_summaries
                else None
            ),
            scores_pages=any(overrides(method, "score_pages") for method in methods),
        )

    def _members(self, method: SparseAttentionMethod) -> torch.Tensor:
        return self._fields[:, METHOD] == self.shape.methods.index(method)

    def _group(self, method: SparseAttentionMethod) -> DecodeGroup:
        rows = torch.arange(self.shape.num_rows, device=self._fields.device)
        return DecodeGroup(
            method=method,
            tiles=rows,
            rows=rows,
            kv_lens=(self.positions + 1).to(torch.int32),
            prompt_lens=self._fields[:, PROMPT_LEN].to(torch.int32),
            pages=self._fields[:, NUM_FIELDS:],
            slots=self._fields[:, SLOT],
            members=self._members(method),
        )

    def _adaptive(self, method: SparseAttentionMethod) -> ThresholdGroup:
        rows = torch.arange(self.shape.num_rows, device=self._fields.device)
        return ThresholdGroup(
            method=method,
            phase=Phase.DECODE,
            tiles=rows,
            kv_lens=self.positions + 1,
            members=self._members(method),
        )


def host_tiles(chunks: Items[Chunk], num_rows: int) -> tuple[Tile, ...]:
    """What the host knows of a step's rows, padding included."""
    tiles = [Tile(row, 1, chunk.start, row, is_decode=True) for row, chunk in enumerate(chunks)]
    padding = [Tile(row, 1, 0, row, is_decode=True) for row in range(len(tiles), num_rows)]
    return tuple(tiles + padding)


def _is_adaptive(method: SparseAttentionMethod) -> bool:
    return method.adapts_thresholds(Phase.DECODE)


def _rounded(count: int) -> int:
    """The next number whose binary form has at most two leading ones: at most a third wasted."""
    power = 1 << (count - 1).bit_length()
    return power * 3 // 4 if power >= 4 and count <= power * 3 // 4 else power
