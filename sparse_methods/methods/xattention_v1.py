"""XAttention: score antidiagonals, and keep the blocks that hold most of the estimated mass.

Source: Xu et al., "XAttention: Block Sparse Attention with Antidiagonal Scoring", ICML 2025,
arXiv:2503.16428, section 2; rule as in the code of mit-han-lab/x-attention (commit e379887).

The estimate of a *cell*, the pairs of ``stride`` queries and ``stride`` keys, is the mean score on
its antidiagonal: one product of the keys of a group laid side by side with the queries of a group
laid side by side in reverse. A softmax over a group of queries gives mass, added up by block.

Departures: the heads of a GQA group share one list, chosen by the mean of their masses. A cell on
the diagonal counts only its pairs with key <= query, where the code mixes in later keys. A group
that the prompt's end cuts short counts the rows it has (a mean over these pairs), where the code
pads with zeros; a group without rows does not count. The sum behind tau runs in float32, not
float64. A list is cut at a sorted prefix without the code's synchronising checks, and ``tau`` is
one number, not a table of heads.
"""

from typing import ClassVar

import torch
from pydantic import Field
from torch.nn import functional
from typing_extensions import override

from sparse_methods.block_method import (
    SCORE_BLOCK,
    BlockKnobs,
    BlockMethod,
    ScoreTiles,
    float32_products,
)
from sparse_methods.errors import UnsupportedError
from sparse_methods.kernels import selection
from sparse_methods.registry import register_sparse_method
from sparse_methods.views import BlockSelection, Phase, PrefillView

_SLAB_TILES = 16  # tiles estimated at once: bounds work above the diagonal
_MAX_CELLS = 1 << 26  # held at a time: 256 MiB


@register_sparse_method("xattention", version="v1")
class XAttention(BlockMethod):
    """Antidiagonal sums estimate each block's share of the attention; the largest are read.

    Use it on long prompts to reach a low density at a set share of the attention. It looks at every
    query and key.
    """

    phases = (Phase.PREFILL,)
    source: ClassVar[str] = "arXiv:2503.16428"
    measured_break_even: ClassVar[int] = 1024

    class Knobs(BlockKnobs):
        """How finely blocks are estimated and how much of the attention is kept."""

        stride: int = Field(
            16,  # 8 costs twice as much and was no better on the built-in model
            ge=2,
            le=64,
            description="Side of an antidiagonal, must divide the block size, tokens.",
        )
        tau: float = Field(
            0.9,
            gt=0,
            le=1,
            description="Share of the estimated attention mass that is read; 1 reads everything.",
        )

    knobs: Knobs

    @property
    @override
    def name(self) -> str:
        return "xattention"

    @override
    def check_servable(self, block_size: int) -> None:
        if block_size % self.knobs.stride:
            raise UnsupportedError(
                f"The stride of 'xattention' must divide the block size, {block_size} tokens, "
                f"got {self.knobs.stride}."
            )

    @override
    def select_prefill(self, view: PrefillView) -> BlockSelection:
        self.check_servable(view.block_size)
        mass = _estimate_mass(view, self.knobs.stride)
        return BlockSelection.of(self._keep(mass, view.tile_blocks))

    @override
    def keep_from_scores(self, tiles: ScoreTiles) -> torch.Tensor:
        stride = self.knobs.stride
        self.check_servable(SCORE_BLOCK)
        squares = tiles.scores.unflatten(4, (-1, stride)).unflatten(3, (-1, stride))
        pairs = squares.flip(-1).diagonal(dim1=-3, dim2=-1)  # [B, Hq, N, groups, groups, stride]
        is_seen = pairs > float("-inf")
        num_seen = is_seen.sum(-1)
        cells = pairs.masked_fill(~is_seen, 0.0).sum(-1) / num_seen.clamp(min=1)
        cells = cells.masked_fill(num_seen == 0, float("-inf"))
        return self._keep(_block_mass(cells, SCORE_BLOCK // stride), tiles.tile_blocks)

    def _keep(self, mass: torch.Tensor, tile_blocks: torch.Tensor) -> torch.Tensor:
        """The rule: the first and the own block, then the largest until they hold tau.

        Args:
            mass: [..., N, M] float32, of the blocks that a tile sees; 0 of the others.
            tile_blocks: [N] number of the block each tile lies in.

        Returns:
            [..., N, M] bool.
        """
        blocks = torch.arange(mass.shape[-1], device=mass.device)
        is_visible = blocks <= tile_blocks[:, None]
        if self.knobs.tau == 1.0:
            return is_visible.expand_as(mass)
        is_forced = (blocks == 0) | (blocks == tile_blocks[:, None])
        ranks = mass.masked_fill(is_forced, float("inf"))
        return (selection.covering(ranks, mass, self.knobs.tau) & is_visible) | is_forced


def _estimate_mass(view: PrefillView, stride: int) -> torch.Tensor:
    """[Hkv, N, M] float32 mass of each block, mean over the heads of a group."""
    if selection.has_kernels(view.query):
        from sparse_methods.kernels import triton_estimates

        if triton_estimates.can_estimate_antidiagonals(view, stride):
            return triton_estimates.antidiagonal_shares(view, stride)
    missing = view.num_blocks * view.block_size - view.kv_len
    keys = functional.pad(view.gather_keys(), (0, 0, 0, missing)).unflatten(1, (-1, stride))
    tiles = view.query_tiles().unflatten(3, (-1, stride))
    per_tile = tiles[:, :, 0, :, 0, 0].numel() * keys.shape[1]
    step = max(1, min(_SLAB_TILES, _MAX_CELLS // per_tile))
    masses = []
    for start in range(0, view.num_tiles, step):
        slab = tiles[:, :, start : start + step]
        cells = _estimate_cells(view, slab, keys, start)
        mass = _block_mass(cells, view.block_size // stride).mean(1)
        masses.append(functional.pad(mass, (0, view.num_blocks - mass.shape[-1])))
    return torch.cat(masses, 1)


def _estimate_cells(
    view: PrefillView, queries: torch.Tensor, keys: torch.Tensor, first_tile: int
) -> torch.Tensor:
    """Mean score on the antidiagonal of each cell that a slab of query tiles sees.

    Args:
        view: What the queries and keys are of.
        queries: [Hkv, G, n, g, stride, D] groups of the slab's tiles; missing rows are zero.
        keys: [Hkv, groups, stride, D]; keys after the last row are zero.
        first_tile: Tile of the view that the slab begins with.

    Returns:
        [Hkv, G, n, g, groups up to the slab's last] float32, -inf where there is no pair.
    """
    num_tiles, per_tile, stride = queries.shape[2:5]
    first_group = (view.first_block + first_tile) * per_tile
    own_keys = keys[:, first_group : first_group + num_tiles * per_tile]
    numbers = torch.arange(num_tiles * per_tile, device=queries.device)
    first_row = first_tile * view.block_size
    num_rows = (view.num_rows - first_row - numbers * stride).clamp(0, stride)

    grouped = queries.flatten(2, 3)  # [Hkv, G, n * g, stride, D]
    reverse = grouped.flip(-2).flatten(-2)
    seen_keys = keys[:, : first_group + num_tiles * per_tile].flatten(-2)
    products = float32_products(reverse.flatten(1, 2), seen_keys)
    cells: torch.Tensor = products.unflatten(1, reverse.shape[1:3])
    cells *= (view.scale / num_rows.clamp(min=1))[:, None]

    half = stride // 2  # from this row of a group on, the antidiagonal has met the diagonal
    own_pairs = grouped[..., half:, :].float() * own_keys.flip(-2)[:, None, :, half:].float()
    num_pairs = (num_rows - half).clamp(min=0)
    own_cells = own_pairs.sum((-1, -2)) * (view.scale / num_pairs.clamp(min=1))
    own_cells = own_cells.masked_fill(num_pairs == 0, float("-inf"))
    cells.diagonal(first_group, -2, -1).copy_(own_cells)

    groups = torch.arange(cells.shape[-1], device=cells.device)
    is_hidden = (groups > first_group + numbers[:, None]) | (num_rows == 0)[:, None]
    cells.masked_fill_(is_hidden, float("-inf"))
    by_tile: torch.Tensor = cells.unflatten(2, (num_tiles, per_tile))
    return by_tile


def _block_mass(cells: torch.Tensor, per_block: int) -> torch.Tensor:
    """[..., N, M] float32 softmax of [..., N, g, cells], added up by block and over g."""
    highest = cells.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    weights = (cells - highest).exp_().unflatten(-1, (-1, per_block)).sum(-1)
    # A running sum, because zeros after it leave it as it is to the last bit: a chunk that ends
    # later then decides alike.
    total = weights.cumsum(-1)[..., -1:]
    mass: torch.Tensor = weights / total.clamp(min=torch.finfo(torch.float32).tiny)
    return mass.sum(-2)
