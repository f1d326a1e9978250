"""What methods that keep whole blocks have in common: the score-level half, and break-even.

A method says once how estimates become kept blocks, and twice where the estimates come from:
from scores (``keep_from_scores``), and from queries and keys (``select_*``).
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch.nn import functional
from typing_extensions import override

from sparse_methods.method import Knobs, SparseAttentionMethod
from sparse_methods.views import Phase

SCORE_BLOCK = 128  # tokens of a block where scores are materialised; serving uses the engine's


@dataclass(frozen=True)
class ScoreTiles:
    """Materialised scores, cut into tiles at absolute multiples of the block size.

    Attributes:
        scores: [B, Hq, N, SCORE_BLOCK, M * SCORE_BLOCK] float32, -inf where a key is not visible;
            rows that a tile lacks are -inf throughout.
        first_row: Position of the first query within its tile.
        num_queries: Lq; the queries are the last ones of the sequence.
        num_keys: Lk.
    """

    scores: torch.Tensor
    first_row: int
    num_queries: int
    num_keys: int

    @classmethod
    def cut(cls, scores: torch.Tensor) -> "ScoreTiles":
        """Cut [B, Hq, Lq, Lk] scores; keys after a row count as not visible."""
        num_queries, num_keys = scores.shape[-2:]
        if num_queries > num_keys:
            raise ValueError(
                f"Queries are the suffix of the keys, got {num_queries} queries, {num_keys} keys."
            )
        keys = torch.arange(num_keys, device=scores.device)
        is_hidden = keys > keys[num_keys - num_queries :, None]
        is_hidden = is_hidden | (scores <= torch.finfo(scores.dtype).min)
        visible = scores.float().masked_fill(is_hidden, float("-inf"))
        first_row = (num_keys - num_queries) % SCORE_BLOCK
        padding = (0, -num_keys % SCORE_BLOCK, first_row, -num_keys % SCORE_BLOCK)
        padded = functional.pad(visible, padding, value=float("-inf"))
        return cls(padded.unflatten(2, (-1, SCORE_BLOCK)), first_row, num_queries, num_keys)

    @property
    def is_decode(self) -> bool:
        """Whether there is one query only."""
        return self.num_queries == 1

    @property
    def num_tiles(self) -> int:
        """N."""
        return self.scores.shape[2]

    @property
    def num_blocks(self) -> int:
        """M."""
        return self.scores.shape[-1] // SCORE_BLOCK

    @property
    def tile_blocks(self) -> torch.Tensor:
        """[N] int64, number of the block each tile lies in."""
        first = self.num_blocks - self.num_tiles
        return torch.arange(first, self.num_blocks, device=self.scores.device)

    @property
    def visible(self) -> torch.Tensor:
        """[N, M] bool, blocks of which a tile sees a key."""
        blocks = torch.arange(self.num_blocks, device=self.scores.device)
        return blocks <= self.tile_blocks[:, None]

    def by_block(self) -> torch.Tensor:
        """[B, Hq, N, rows, M, keys] the scores by block of keys."""
        blocks: torch.Tensor = self.scores.unflatten(-1, (-1, SCORE_BLOCK))
        return blocks

    def mask(self, is_kept: torch.Tensor) -> torch.Tensor:
        """[B, Hq, Lq, Lk] bool, the visible elements of the kept blocks [B, Hq, N, M]."""
        elements = is_kept.repeat_interleave(SCORE_BLOCK, -1)[:, :, :, None] & (
            self.scores > float("-inf")
        )
        stop = self.first_row + self.num_queries
        rows: torch.Tensor = elements.flatten(2, 3)[:, :, self.first_row : stop]
        return rows[..., : self.num_keys]

    def statistics(self, is_kept: torch.Tensor) -> dict[str, Any]:
        """Statistics of kept blocks [B, Hq, N, M], counted per query head and added up."""
        visible = self.visible.expand_as(is_kept)
        total, kept = int(visible.sum()), int((is_kept & visible).sum())
        return {
            "sparsity": 1.0 - kept / total,
            "total_blocks": total,
            "sparse_blocks": total - kept,
            "phase": str(Phase.DECODE if self.is_decode else Phase.PREFILL),
            "sample_length": self.num_keys,
        }


def float32_products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """[B, n, m] float32 products of rows [B, n, d] and [B, m, d], summed in float32."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.bmm(a, b.mT, out_dtype=torch.float32)  # tensor cores; not on the CPU
    return a.float() @ b.float().mT


class BlockKnobs(Knobs):
    """What every method that selects blocks lets a client set."""

    dense_below: int | None = Field(
        None,
        ge=0,
        le=1_048_576,
        description="Prompts (decode: contexts) shorter than this run dense, tokens; 0 never does,"
        " unset takes the length that was measured.",
    )


class BlockMethod(SparseAttentionMethod):
    """A method that keeps whole blocks of keys for each query tile.

    Attributes:
        measured_break_even: Fewest tokens for which it was faster than dense attention on a CPU
            (``docs/lab.md`` has the measurement); 0 if it never was slower.
    """

    measured_break_even: ClassVar[int] = 0
    Knobs = BlockKnobs
    knobs: BlockKnobs

    @abstractmethod
    def keep_from_scores(self, tiles: ScoreTiles) -> torch.Tensor:
        """[B, Hq, N, M] bool, the blocks that the rule keeps, of those that are visible."""

    @override
    def calculate_sparsity(
        self, attention_scores: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        tiles = ScoreTiles.cut(attention_scores)
        phase = Phase.DECODE if tiles.is_decode else Phase.PREFILL
        if phase in self.phases:
            is_kept = self.keep_from_scores(tiles) & tiles.visible
        else:
            is_kept = tiles.visible.expand(*attention_scores.shape[:2], -1, -1)
        return tiles.mask(is_kept), tiles.statistics(is_kept)

    @override
    def apply_sparsity(
        self, attention_scores: torch.Tensor, sparse_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        return super().apply_sparsity(attention_scores, sparse_mask)

    @override
    def break_even(self, phase: Phase) -> int:
        given = self.knobs.dense_below
        return self.measured_break_even if given is None else given
