"""Block top-k: compare each tile's mean query with each block's mean key and keep the best blocks.

Source: Jiang et al., "MInference 1.0", NeurIPS 2024, arXiv:2407.02490, appendix C.2 (block-sparse
head): mean-pooled queries and keys, the top k blocks of each tile.

Departures: the budget is a share of the blocks a tile sees instead of 100 of them; the first block,
the tile's own and the one before it are always read, and count towards the budget, where the paper
forces none; the heads of a group share a list, chosen by the sum over heads of the softmax over
blocks: a sum of shares of attention, so that a head with large scores does not decide alone.
The softmax leaves the three blocks out that are always read: the share they take would differ
between heads and hide what a head wants of the rest.
"""

from typing import ClassVar

import torch
from pydantic import Field
from typing_extensions import override

from sparse_methods.block_method import BlockKnobs, BlockMethod, ScoreTiles
from sparse_methods.kernels.selection import group_shares, largest
from sparse_methods.registry import register_sparse_method
from sparse_methods.views import BlockSelection, Phase, PrefillView


@register_sparse_method("block_topk", version="v1")
class BlockTopK(BlockMethod):
    """The blocks whose mean key is nearest to the tile's mean query: very cheap, and coarse.

    Use it on prompts where the cost must be known beforehand: the share of blocks is fixed. A
    single key that matters disappears in its block's mean.
    """

    phases: ClassVar[tuple[Phase, ...]] = (Phase.PREFILL,)
    measured_break_even: ClassVar[int] = 1024
    source: ClassVar[str] = "arXiv:2407.02490"
    uses_summaries = True

    class Knobs(BlockKnobs):
        """How many blocks a tile reads: a share of those it sees, but not fewer than a minimum."""

        keep_ratio: float = Field(
            0.25, gt=0, le=1, description="Share of its visible blocks that a tile reads."
        )
        min_blocks: int = Field(
            8, ge=3, le=4096, description="Blocks that a tile reads at least, if it sees them."
        )

    knobs: Knobs

    @property
    @override
    def name(self) -> str:
        return "block_topk"

    @override
    def select_prefill(self, view: PrefillView) -> BlockSelection:
        scores = view.tile_means() @ view.block_means()[:, None].mT * view.scale
        return BlockSelection.of(self._keep(scores, view.tile_blocks))

    @override
    def keep_from_scores(self, tiles: ScoreTiles) -> torch.Tensor:
        is_seen = tiles.scores > float("-inf")
        sums = tiles.by_block().masked_fill(~tiles.by_block().isfinite(), 0.0).sum((3, 5))
        counts = is_seen.unflatten(-1, (tiles.num_blocks, -1)).sum((3, 5)).clamp(min=1)
        return self._keep((sums / counts)[:, :, None], tiles.tile_blocks)

    def _keep(self, scores: torch.Tensor, tile_blocks: torch.Tensor) -> torch.Tensor:
        """The rule: what is always read, then the best until the budget is used up.

        Args:
            scores: [..., G, N, M] float32 mean scores of the heads of a group; those of blocks
                that a tile does not see are ignored.
            tile_blocks: [N] number of the block each tile lies in.

        Returns:
            [..., N, M] bool.
        """
        blocks, own = torch.arange(scores.shape[-1], device=scores.device), tile_blocks[:, None]
        shares = group_shares(scores, tile_blocks, first=1, recent=2)  # inf of these
        budget = ((own + 1) * self.knobs.keep_ratio).ceil().clamp(min=self.knobs.min_blocks)
        is_forced = (blocks == 0) | (blocks >= own - 1)
        return (largest(shares, budget) | is_forced) & (blocks <= own)
