"""FlashPrefill: score every query row against each block's mean key, keep what is near the best.

Source: FlashPrefill (qhfan/FlashPrefill, commit 74e42f3) and FlashPrefill v2 (commit 0f8e791),
arXiv:2608.19758.

For every row ``u_c = q . mean key of block c``; a block's score is the sum over the tile's rows of
``exp(u_c - shared maximum)``; a block stays if its score is at least ``alpha`` of the best one's.

Departures: the heads of a GQA group share one list, as in v2, chosen by the sum of their scores,
each head's normalised to one first, so that a head with large scores does not decide alone (v2
shares one maximum). The last query tiles of a prompt are selected like all others, where the code
reads everything: what a prefix computes then does not depend on where the prompt ends, and can be
reused. ``alpha`` is lower by default. No layer is dense, and v2's pseudo-keys for what was left out
are not added. Scores that are already materialised have no keys after a query, so that there the
block on the diagonal, which is read in any case, enters the maximum with the mean of the visible
scores.
"""

from typing import ClassVar

import torch
from pydantic import Field
from torch.nn import functional
from typing_extensions import override

from sparse_methods.block_method import BlockKnobs, BlockMethod, ScoreTiles
from sparse_methods.kernels import selection
from sparse_methods.registry import register_sparse_method
from sparse_methods.views import BlockSelection, Phase, PrefillView

_SLAB_TILES = 16  # tiles scored at once: bounds memory, and work above the diagonal


@register_sparse_method("flashprefill", version="v1")
class FlashPrefill(BlockMethod):
    """Mean keys score every query row; blocks near the best one are read.

    Use it on long prompts where the number of blocks should follow the text.
    """

    phases = (Phase.PREFILL,)
    source: ClassVar[str] = "github.com/qhfan/FlashPrefill"
    measured_break_even: ClassVar[int] = 1024
    uses_summaries = True

    class Knobs(BlockKnobs):
        """How near the best a block must be, and what is read in any case."""

        alpha: float = Field(
            0.05,  # the authors' 0.08 to 0.22 lost planted facts on the built-in model
            ge=0,
            le=1,
            description="Share of the best block's score that a block needs; 0 reads everything.",
        )
        sink_blocks: int = Field(
            2, ge=1, le=64, description="First blocks of the sequence that are always read, blocks."
        )
        window_blocks: int = Field(
            4,
            ge=1,
            le=4096,
            description="Most recent blocks always read, the query's own included, blocks.",
        )

    knobs: Knobs

    @property
    @override
    def name(self) -> str:
        return "flashprefill"

    @override
    def select_prefill(self, view: PrefillView) -> BlockSelection:
        return BlockSelection.of(self._keep(_shares(view, view.block_means()), view.tile_blocks))

    @override
    def keep_from_scores(self, tiles: ScoreTiles) -> torch.Tensor:
        blocks = tiles.by_block()
        is_seen = blocks > float("-inf")
        num_seen = is_seen.sum(-1)
        means = blocks.masked_fill(~is_seen, 0.0).sum(-1) / num_seen.clamp(min=1)
        score = _share(means.masked_fill(num_seen == 0, float("-inf")))
        return self._keep(score, tiles.tile_blocks)

    def _keep(self, scores: torch.Tensor, tile_blocks: torch.Tensor) -> torch.Tensor:
        """The rule: sinks, the window, and what reaches alpha of the best.

        Args:
            scores: [..., N, M] float32, of the blocks that a tile sees; 0 of the others.
            tile_blocks: [N] number of the block each tile lies in.

        Returns:
            [..., N, M] bool.
        """
        blocks, own = torch.arange(scores.shape[-1], device=scores.device), tile_blocks[:, None]
        is_forced = (blocks < self.knobs.sink_blocks) | (blocks > own - self.knobs.window_blocks)
        is_near_best = scores >= self.knobs.alpha * scores.amax(-1, keepdim=True)
        return (is_near_best | is_forced) & (blocks <= own)


def _shares(view: PrefillView, means: torch.Tensor) -> torch.Tensor:
    """[Hkv, N, M] float32 sum of the shares of a group's heads, from mean keys [Hkv, M, D]."""
    if selection.has_kernels(view.query):
        from sparse_methods.kernels import triton_estimates

        if triton_estimates.can_share_by_mean_keys(view):
            return triton_estimates.mean_key_shares(view, means)
    tiles, shares = view.query_tiles(), []
    for start in range(0, view.num_tiles, _SLAB_TILES):
        slab = tiles[:, :, start : start + _SLAB_TILES]
        share = _share(_mean_scores(view, slab, means, start)).sum(1)
        shares.append(functional.pad(share, (0, view.num_blocks - share.shape[-1])))
    return torch.cat(shares, 1)


def _mean_scores(
    view: PrefillView, queries: torch.Tensor, means: torch.Tensor, first_tile: int
) -> torch.Tensor:
    """Score of every row of a slab of query tiles with each block's mean key.

    Args:
        view: What the queries and keys are of.
        queries: [Hkv, G, n, rows, D] of the slab; missing rows are zero.
        means: [Hkv, M, D] float32.
        first_tile: Tile of the view that the slab begins with.

    Returns:
        [Hkv, G, n, rows, blocks up to the slab's last] float32, -inf where a row is missing or the
        tile does not see the block.
    """
    num_tiles, num_rows = queries.shape[2:4]
    first_block = view.first_block + first_tile
    num_blocks = first_block + num_tiles
    flat = (queries.float() * view.scale).flatten(1, 3)
    scores: torch.Tensor = (flat @ means[:, :num_blocks].mT).unflatten(1, queries.shape[1:4])
    tiles = torch.arange(num_tiles, device=queries.device)[:, None, None]
    rows = (first_tile + tiles) * num_rows + torch.arange(num_rows, device=queries.device)[:, None]
    blocks = torch.arange(num_blocks, device=queries.device)
    is_hidden = (rows >= view.num_rows) | (blocks > first_block + tiles)
    return scores.masked_fill_(is_hidden, float("-inf"))


def _share(scores: torch.Tensor) -> torch.Tensor:
    """[..., N, M] float32 exp of [..., N, rows, M], summed over rows; each tile sums to 1."""
    highest = scores.amax((-1, -2), keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    weights = (scores - highest).exp_().sum(-2)
    # A running sum, because zeros after it leave it as it is to the last bit: a chunk that ends
    # later then decides alike.
    total = weights.cumsum(-1)[..., -1:]
    return weights / total.clamp(min=torch.finfo(torch.float32).tiny)
