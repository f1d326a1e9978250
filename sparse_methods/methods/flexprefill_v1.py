"""FlexPrefill: read the least blocks that hold a share gamma of the attention, by either estimate.

Source: Lai et al., "FlexPrefill", ICLR 2025, arXiv:2502.20766, algorithms 1 to 4.

Departures:

- The paper estimates once, from the last 128 queries of the whole prompt, for every query tile: a
  prompt that arrives in chunks has no such rows yet. Here each tile estimates from its own rows,
  so chunks give what the whole prompt gives: attention from the tile's last row and every
  ``row_stride``-th before it, pooled scores from the mean of all its rows.
- Gamma is reached per query tile. The paper flattens the pooled map of a head over all tiles, which
  a chunk does not know, and which starves some tiles.
- The pooled score of a tile with its own block is the mean of the sampled scores that causality
  leaves visible there; the paper pools the hidden ones too.
- The query heads of a group share a list. Heads of one branch add their estimates, normalised, and
  gamma counts on the sum; a group with heads of both branches reads what either chose. A union of
  the heads' choices lies on the same frontier of density and quality, and sorts once per head.
- The minimum budget is the blocks with most attention by the sampled rows, in either branch; the
  paper's is a least number of columns and one of diagonals.
"""

from typing import ClassVar

import torch
from pydantic import Field
from torch.nn import functional
from typing_extensions import override

from sparse_methods.block_method import SCORE_BLOCK, BlockKnobs, BlockMethod, ScoreTiles
from sparse_methods.kernels import selection
from sparse_methods.registry import register_sparse_method
from sparse_methods.views import BlockSelection, Phase, PrefillView


@register_sparse_method("flexprefill", version="v1")
class FlexPrefill(BlockMethod):
    """Reads what holds a set share of attention: columns and diagonals, or pooled blocks.

    Use it on long prompts of a model whose heads differ in kind: each group takes the estimate that
    fits it.
    """

    phases: ClassVar[tuple[Phase, ...]] = (Phase.PREFILL,)
    measured_break_even: ClassVar[int] = 1024
    source: ClassVar[str] = "arXiv:2502.20766"
    uses_summaries: ClassVar[bool] = True

    class Knobs(BlockKnobs):
        """How much attention is covered, and which estimate is trusted."""

        gamma: float = Field(
            0.9, gt=0, le=1, description="Share of the estimated attention that is read, 0 to 1."
        )
        tau: float = Field(
            0.1,
            ge=0,
            le=1,
            description="Distance (root of the Jensen-Shannon divergence, nats) below which pooled"
            " scores are trusted; 0 never trusts them.",
        )
        min_budget_blocks: int = Field(
            4,  # 512 tokens, as in the authors' README
            ge=1,
            le=4096,
            description="Blocks that each tile reads at least, by sampled attention, blocks.",
        )
        row_stride: int = Field(
            16, ge=1, le=128, description="Distance of the rows that a tile samples, tokens."
        )

    knobs: Knobs

    @property
    @override
    def name(self) -> str:
        return "flexprefill"

    @override
    def select_prefill(self, view: PrefillView) -> BlockSelection:
        if selection.has_kernels(view.query):
            from sparse_methods.kernels import triton_samples

            if triton_samples.can_sample(view):
                return BlockSelection.of(self._kept_by_kernels(view))
        size, stride = view.block_size, self.knobs.row_stride
        keys, means = view.gather_keys().transpose(1, 2), view.block_means().transpose(1, 2)
        tiles = view.query_tiles()
        is_kept = view.visible.expand(view.num_kv_heads, -1, -1).clone()
        for tile in range(view.num_tiles):
            own = view.first_block + tile
            num_rows = min(size, view.num_rows - tile * size)
            first_row = (num_rows - 1) % stride
            rows = tiles[:, :, tile, first_row:num_rows:stride]  # [Hkv, G, S, D]
            products = rows.flatten(1, 2) @ keys[..., : own * size + num_rows]
            scores = products.unflatten(1, rows.shape[1:3]).float().mul_(view.scale)
            _hide_later_keys(scores[..., own * size :], first_row, stride)
            pooled_row = tiles[:, :, tile].float().sum(-2) / num_rows
            pooled = pooled_row @ means[..., :own] * view.scale
            is_kept[:, tile, : own + 1] = self._keep(scores, pooled, size)
        return BlockSelection.of(is_kept)

    def _kept_by_kernels(self, view: PrefillView) -> torch.Tensor:
        """[Hkv, N, M] bool, what ``_keep`` keeps of each tile, all tiles together."""
        from sparse_methods.kernels import triton_lines, triton_samples, triton_trust

        gamma, own = self.knobs.gamma, view.tile_blocks[:, None]
        blocks = torch.arange(view.num_blocks, device=own.device)
        sampled = triton_samples.sample(view, self.knobs.row_stride)
        pooled, is_pooled = triton_trust.trusted_mass(
            view.tile_means() @ view.block_means()[:, None].mT * view.scale,
            triton_samples.own_means(view, self.knobs.row_stride),
            sampled.mass,
            view.first_block,
            self.knobs.tau,
        )
        is_kept = self._minimum(sampled.mass.sum(1))
        is_kept |= selection.covering(pooled, pooled, gamma) & (pooled > 0)
        by_lines = sampled.without(is_pooled)
        step = triton_samples.lines_at_once(view)
        for start in range(0, view.num_tiles, step):
            tiles = range(start, min(start + step, view.num_tiles))
            for add_up in (triton_samples.columns, triton_samples.diagonals):
                lines = add_up(view, by_lines, tiles, triton_samples.Choice())
                counts, mass = triton_lines.fewest_blocks(
                    lines, view.first_block + start, view.block_size, gamma
                )
                is_kept[:, start : tiles.stop, : mass.shape[-1]] |= _largest(mass, counts)
        return (is_kept & (blocks <= own)) | (blocks == 0) | (blocks == own)

    @override
    def keep_from_scores(self, tiles: ScoreTiles) -> torch.Tensor:
        is_kept = tiles.visible.expand(*tiles.scores.shape[:2], -1, -1).clone()
        for tile in range(tiles.num_tiles):
            own = tiles.num_blocks - tiles.num_tiles + tile
            start = tiles.first_row if tile == 0 else 0
            stop = min(SCORE_BLOCK, tiles.num_keys - own * SCORE_BLOCK)
            seen = tiles.scores[:, :, tile, start:stop, : own * SCORE_BLOCK + stop]
            sample = seen[:, :, (stop - start - 1) % self.knobs.row_stride :: self.knobs.row_stride]
            blocks = seen[..., : own * SCORE_BLOCK].unflatten(-1, (own, SCORE_BLOCK))
            pooled = blocks.mean((2, 4))  # the mean of products is the product of means
            heads = self._keep(
                sample.flatten(0, 1)[:, None], pooled.flatten(0, 1)[:, None], SCORE_BLOCK
            )
            is_kept[:, :, tile, : own + 1] = heads.unflatten(0, is_kept.shape[:2])
        return is_kept

    def _keep(self, scores: torch.Tensor, pooled: torch.Tensor, block_size: int) -> torch.Tensor:
        """The rule: blocks that one query tile reads.

        Args:
            scores: [Hkv, G, S, keys] float32 of the sampled rows, -inf where a key is not visible.
            pooled: [Hkv, G, M - 1] float32 scores of the mean row with the mean keys of the blocks
                before the tile's own.
            block_size: Keys of a block, in tokens.

        Returns:
            [Hkv, M] bool.
        """
        is_kept = self._choose(scores, _with_own_block(pooled, scores, block_size), block_size)
        is_kept[:, 0] = is_kept[:, -1] = True
        return is_kept

    def _minimum(self, mass: torch.Tensor) -> torch.Tensor:
        """[..., M] bool, the blocks with most of the mass [..., M], as many as are always read."""
        budget = torch.full_like(mass[..., :1], self.knobs.min_budget_blocks)
        return _largest(mass, budget)

    def _choose(self, scores: torch.Tensor, pooled: torch.Tensor, block_size: int) -> torch.Tensor:
        """``_keep`` with the pooled scores [Hkv, G, M] of all blocks, but for what is forced."""
        gamma, stride = self.knobs.gamma, self.knobs.row_stride
        pooled_mass = pooled.softmax(-1)
        attention = scores.softmax(-1)
        block_mass = _by_block(attention.mean(-2), block_size)
        is_pooled = (_distance(pooled_mass, block_mass) < self.knobs.tau)[..., None]
        by_row = attention.masked_fill(is_pooled[..., None], 0.0).sum(1)
        columns, diagonals = by_row.sum(-2), _diagonals(by_row, stride)
        pooled_mass = pooled_mass.masked_fill(~is_pooled, 0.0).sum(1)
        is_kept = self._minimum(block_mass.sum(1))
        is_kept |= _largest(pooled_mass, _num_covering(pooled_mass, gamma))
        for lines in (columns, diagonals):
            num_blocks = _num_covering(lines, gamma) // block_size + 1
            is_kept |= _largest(_by_block(lines, block_size), num_blocks)
        return is_kept


def _hide_later_keys(own_block: torch.Tensor, first_row: int, stride: int) -> None:
    """Set scores [..., S, keys] to -inf in place where a key comes after its row.

    Rows are ``stride`` positions apart, the first at ``first_row``, counted from the first key.
    """
    rows = torch.arange(own_block.shape[-2], device=own_block.device) * stride + first_row
    keys = torch.arange(own_block.shape[-1], device=own_block.device)
    own_block.masked_fill_(keys > rows[:, None], float("-inf"))


def _with_own_block(pooled: torch.Tensor, scores: torch.Tensor, block_size: int) -> torch.Tensor:
    """[..., M] pooled scores with that of the own block, the last: the mean over what is visible.

    ``pooled`` is [..., M - 1], ``scores`` [..., S, keys].
    """
    own = _visible_mean(scores[..., pooled.shape[-1] * block_size :])
    return torch.cat([pooled, own[..., None]], -1)


def _visible_mean(scores: torch.Tensor) -> torch.Tensor:
    """[...] mean of those of the scores [..., S, keys] that are not -inf."""
    is_visible = scores > float("-inf")
    total = scores.masked_fill(~is_visible, 0.0).sum((-2, -1))
    return total / is_visible.sum((-2, -1)).clamp(min=1)


def _by_block(mass: torch.Tensor, block_size: int) -> torch.Tensor:
    """[..., M] sums of [..., keys] over the keys of each block."""
    padded = functional.pad(mass, (0, -mass.shape[-1] % block_size))
    blocks: torch.Tensor = padded.unflatten(-1, (-1, block_size)).sum(-1)
    return blocks


def _diagonals(by_row: torch.Tensor, stride: int) -> torch.Tensor:
    """[H, keys] sums of [H, S, keys] along diagonals, each at the key where the last row meets it.

    A row lies ``stride`` positions before the next, so it meets a diagonal ``stride`` keys earlier.
    """
    num_rows = by_row.shape[1]
    padded = functional.pad(by_row, ((num_rows - 1) * stride, 0))
    width = padded.shape[-1]
    sheared = padded.as_strided(by_row.shape, (num_rows * width, width + stride, 1))
    return sheared.sum(-2)


def _distance(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """[...] root of the Jensen-Shannon divergence of distributions [..., M], in nats."""
    middle = (p + q) / 2
    divergence = (_relative_entropy(p, middle) + _relative_entropy(q, middle)) / 2
    return divergence.clamp(min=0.0).sqrt()


def _relative_entropy(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(-1)


def _num_covering(mass: torch.Tensor, share: float) -> torch.Tensor:
    """[H, 1] fewest entries of [H, ...] that together reach the share of the sum; 0 if it is 0."""
    ordered = mass.sort(-1, descending=True).values
    before = ordered.cumsum(-1) - ordered
    return (before < share * mass.sum(-1, keepdim=True)).sum(-1, keepdim=True)


def _largest(mass: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """[..., M] bool, the largest ``counts`` [..., 1] of the entries [..., M], none of them 0."""
    return selection.largest(mass, counts) & (mass > 0)
