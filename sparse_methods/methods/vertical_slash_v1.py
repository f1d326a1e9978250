"""Vertical-slash: read the columns and the diagonals that a sample of the query rows looks at.

Source: Jiang et al., "MInference 1.0", NeurIPS 2024, arXiv:2407.02490, section 3 and algorithm 1.

Departures:

- The paper estimates once, from the last 64 queries of the whole prompt, for every query tile: a
  prompt that arrives in chunks has no such rows yet, and the question at its end decides for all.
  Here each tile estimates from its own last row and every ``row_stride``-th before it, so chunks
  give what the whole prompt gives.
- The engine reads whole blocks. The paper's top columns lie spread over the prompt, so that reading
  the blocks of all would keep nearly everything: here blocks compete by the sum of their columns,
  and the budget is in blocks. Diagonals compete one by one; a tile reads every block one crosses.
- The paper forces 30 columns and 100 diagonals and searches the budgets per head. Here the first
  and the most recent blocks are always read, compete with nothing and use up no budget; budgets are
  one for all heads, and columns or diagonals below ``min_share`` are left out even within them.
- The query heads of a group share a list: their attention is averaged before anything is ranked, so
  the budget holds for the group. A union of their choices reads up to a group's size times as much.
"""

from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field
from torch.nn import functional
from typing_extensions import override

from sparse_methods.block_method import SCORE_BLOCK, BlockKnobs, BlockMethod, ScoreTiles
from sparse_methods.kernels import selection
from sparse_methods.registry import register_sparse_method
from sparse_methods.views import BlockSelection, Phase, PrefillView

_TILES_AT_ONCE = 16  # whose sampled rows are multiplied with the keys together
_MAX_PRODUCTS = 1 << 29  # held at a time, if one tile has no more: 1 GiB in bfloat16


@register_sparse_method("vertical_slash", version="v1")
class VerticalSlash(BlockMethod):
    """Reads the columns and diagonals with most attention, by a sample of each tile's rows.

    Use it on long prompts of a model whose heads look along columns and diagonals.
    """

    phases: ClassVar[tuple[Phase, ...]] = (Phase.PREFILL,)
    measured_break_even: ClassVar[int] = 1024
    source: ClassVar[str] = "arXiv:2407.02490"

    class Knobs(BlockKnobs):
        """How many columns and diagonals are read, and how they are estimated."""

        sink_blocks: int = Field(
            1, ge=1, le=64, description="First blocks of the sequence that are always read, blocks."
        )
        recent_blocks: int = Field(
            2,
            ge=1,
            le=4096,
            description="Most recent blocks that are always read, the query's own too, blocks.",
        )
        vertical_blocks: int = Field(
            16, ge=0, le=4096, description="Most blocks of columns that a tile reads, blocks."
        )
        slash_diagonals: int = Field(
            32, ge=0, le=65_536, description="Most diagonals that a tile reads, tokens."
        )
        min_share: float = Field(
            0.02,
            ge=0,
            le=1,
            description="Share of the sampled attention that a block of columns or a diagonal needs"
            " to be read, 0 to 1.",
        )
        row_stride: int = Field(
            16, ge=1, le=128, description="Distance of the rows that a tile samples, tokens."
        )

    knobs: Knobs

    @property
    @override
    def name(self) -> str:
        return "vertical_slash"

    @override
    def select_prefill(self, view: PrefillView) -> BlockSelection:
        if selection.has_kernels(view.query):
            from sparse_methods.kernels import triton_samples

            if triton_samples.can_sample(view):
                return BlockSelection.of(self._kept_by_kernels(view))
        size, stride = view.block_size, self.knobs.row_stride
        is_kept = view.visible.expand(view.num_kv_heads, -1, -1).clone()
        slabs = self._products(view, _MAX_PRODUCTS)
        for tile, products in enumerate(tile for slab in slabs for tile in slab.unbind(2)):
            own = view.first_block + tile
            num_rows = min(size, view.num_rows - tile * size)
            scores = products[..., : own * size + num_rows].float().mul_(view.scale)
            _hide_later_keys(scores[..., own * size :], (num_rows - 1) % stride, stride)
            is_kept[:, tile, : own + 1] = self._keep(scores, own, size)
        return BlockSelection.of(is_kept)

    def _products(self, view: PrefillView, max_products: int) -> Iterator[torch.Tensor]:
        """Products of the sampled rows of some tiles with keys, tile after tile.

        They are [Hkv, G, n, S, keys up to the last row of the last of these tiles]. Tiles that
        sample alike are multiplied together: a few rows at a time would read all keys again for
        each tile.
        """
        size, stride = view.block_size, self.knobs.row_stride
        keys, tiles = view.gather_keys().transpose(1, 2), view.query_tiles()
        num_full, tile = view.num_rows // size, 0
        per_tile = tiles[:, :, 0, ::stride, 0].numel() * view.kv_len
        most = min(_TILES_AT_ONCE, max_products // per_tile)
        while tile < view.num_tiles:
            count = max(1, min(most, num_full - tile))
            num_rows = min(size, view.num_rows - tile * size)
            rows = tiles[:, :, tile : tile + count, (num_rows - 1) % stride : num_rows : stride]
            stop = (view.first_block + tile + count - 1) * size + num_rows
            products = rows.flatten(1, 3) @ keys[..., :stop]
            yield products.unflatten(1, rows.shape[1:4])
            tile += count

    def _kept_by_kernels(self, view: PrefillView) -> torch.Tensor:
        """[Hkv, N, M] bool, what ``_keep`` keeps of each tile, all tiles together."""
        from sparse_methods.kernels import triton_lines, triton_samples

        knobs, own = self.knobs, view.tile_blocks[:, None]
        blocks = torch.arange(view.num_blocks, device=own.device)
        is_choice = (blocks >= knobs.sink_blocks) & (blocks <= own - knobs.recent_blocks)
        sampled = triton_samples.sample(view, knobs.row_stride)
        columns = sampled.mass.mean(1).masked_fill(~is_choice, 0.0)
        budget = torch.full_like(columns[..., :1], knobs.vertical_blocks)
        is_read = selection.largest(columns, budget) & (columns > knobs.min_share)
        choice = triton_samples.Choice(knobs.sink_blocks, knobs.recent_blocks)
        step = triton_samples.lines_at_once(view)
        for start in range(0, view.num_tiles, step):
            tiles = range(start, min(start + step, view.num_tiles))
            is_met = triton_lines.crossed_blocks(
                triton_samples.diagonals(view, sampled, tiles, choice),
                view.first_block + start,
                view.block_size,
                knobs.slash_diagonals,
                knobs.min_share,
            )
            is_read[:, start : tiles.stop, : is_met.shape[-1]] |= is_met
        is_kept: torch.Tensor = (is_read & is_choice) | ((blocks <= own) & ~is_choice)
        return is_kept

    @override
    def keep_from_scores(self, tiles: ScoreTiles) -> torch.Tensor:
        is_kept = tiles.visible.expand(*tiles.scores.shape[:2], -1, -1).clone()
        for tile in range(tiles.num_tiles):
            own = tiles.num_blocks - tiles.num_tiles + tile
            start = tiles.first_row if tile == 0 else 0
            stop = min(SCORE_BLOCK, tiles.num_keys - own * SCORE_BLOCK)
            seen = tiles.scores[:, :, tile, start:stop, : own * SCORE_BLOCK + stop]
            sample = seen[:, :, (stop - start - 1) % self.knobs.row_stride :: self.knobs.row_stride]
            heads = self._keep(sample.flatten(0, 1)[:, None], own, SCORE_BLOCK)
            is_kept[:, :, tile, : own + 1] = heads.unflatten(0, is_kept.shape[:2])
        return is_kept

    def _keep(self, scores: torch.Tensor, own_block: int, block_size: int) -> torch.Tensor:
        """The rule: blocks that one query tile reads.

        Args:
            scores: [Hkv, G, S, keys] float32 of the sampled rows, -inf where a key is not visible.
            own_block: Number of the block the tile lies in.
            block_size: Keys of a block, in tokens.

        Returns:
            [Hkv, own_block + 1] bool.
        """
        knobs = self.knobs
        first, stop = knobs.sink_blocks, own_block + 1 - knobs.recent_blocks
        is_kept = torch.ones(scores.shape[0], own_block + 1, dtype=torch.bool, device=scores.device)
        if stop <= first:
            return is_kept
        attention = scores.softmax(-1)[..., first * block_size : stop * block_size]
        by_row = attention.mean(1) / scores.shape[2]
        columns = by_row.sum(-2).unflatten(-1, (-1, block_size)).sum(-1)
        is_read = _largest(columns, knobs.vertical_blocks, knobs.min_share)
        diagonals = _diagonals(by_row, knobs.row_stride, block_size)
        is_chosen = _largest(diagonals, knobs.slash_diagonals, knobs.min_share)
        is_kept[:, first:stop] = is_read | _crossed(is_chosen, block_size)
        return is_kept


def _hide_later_keys(own_block: torch.Tensor, first_row: int, stride: int) -> None:
    """Set scores [..., S, keys] to -inf in place where a key comes after its row.

    Rows are ``stride`` positions apart, the first at ``first_row``, counted from the first key.
    """
    rows = torch.arange(own_block.shape[-2], device=own_block.device) * stride + first_row
    keys = torch.arange(own_block.shape[-1], device=own_block.device)
    own_block.masked_fill_(keys > rows[:, None], float("-inf"))


def _diagonals(by_row: torch.Tensor, stride: int, block_size: int) -> torch.Tensor:
    """[H, keys + block_size] sums of [H, S, keys] along diagonals, at the key the last row meets.

    A row lies ``stride`` positions before the next, so it meets a diagonal ``stride`` keys earlier;
    the last row meets some of them up to a block beyond the keys given.
    """
    num_rows, num_keys = by_row.shape[1:]
    padded = functional.pad(by_row, ((num_rows - 1) * stride, block_size))
    width = padded.shape[-1]
    shape = (by_row.shape[0], num_rows, num_keys + block_size)
    sheared = padded.as_strided(shape, (num_rows * width, width + stride, 1))
    return sheared.sum(-2)


def _crossed(is_chosen: torch.Tensor, block_size: int) -> torch.Tensor:
    """[H, M] bool, blocks that a full tile's rows meet on the chosen diagonals.

    ``is_chosen`` [H, (M + 1) * block_size] is by the key the last row meets; the first row meets
    one ``block_size - 1`` keys earlier.
    """
    by_last_row = is_chosen.unflatten(-1, (-1, block_size)).any(-1)[:, :-1]
    earlier = functional.pad(is_chosen[:, block_size - 1 :], (0, block_size - 1))
    by_first_row = earlier.unflatten(-1, (-1, block_size)).any(-1)[:, :-1]
    return torch.logical_or(by_last_row, by_first_row)


def _largest(mass: torch.Tensor, count: int, least: float) -> torch.Tensor:
    """[H, M] bool, the ``count`` largest entries of [H, M], those not above ``least`` left out."""
    order = mass.topk(min(count, mass.shape[-1])).indices
    is_largest = torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, order, value=True)
    return is_largest & (mass > least)
