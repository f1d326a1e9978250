"""What the oracles have in common: the attention mass of every block, known from all scores.

Source: the oracles of xAlg-ai/sparse-attention-hub (commit 1a048c9), taken to whole blocks.

Departures: blocks instead of tokens, ranked by their softmax mass, averaged over the rows of a tile
and the heads of a GQA group, which share one list; the first block and the query's own are read in
any case; the sums run in float32 whatever the query's dtype.
"""

from abc import abstractmethod
from typing import ClassVar

import torch
from torch.nn import functional
from typing_extensions import override

from sparse_methods.block_method import BlockMethod, ScoreTiles
from sparse_methods.views import BlockSelection, DecodeView, PageSelection, PrefillView


class OracleMethod(BlockMethod):
    """Keeps the blocks of the largest exact attention mass; how many is the subclass's rule."""

    source: ClassVar[str] = "github.com/xAlg-ai/sparse-attention-hub"
    evaluation_only = True

    @abstractmethod
    def is_within_budget(self, mass: torch.Tensor, num_visible: torch.Tensor) -> torch.Tensor:
        """Decide up to which rank blocks are read.

        Args:
            mass: [..., N, M] float32, the first and the own block, then the others by falling mass.
            num_visible: [N, 1] blocks that each tile sees; the mass of the others is 0.

        Returns:
            [..., N, M] bool, True up to some rank; the first and the own block are read anyway.
        """

    @override
    def select_prefill(self, view: PrefillView) -> BlockSelection:
        return BlockSelection.of(self._keep(_prefill_mass(view), view.tile_blocks))

    @override
    def select_decode(self, view: DecodeView) -> PageSelection:
        is_kept = self._keep(_decode_mass(view), view.own_pages)
        return PageSelection.of(is_kept.transpose(0, 1))

    @override
    def keep_from_scores(self, tiles: ScoreTiles) -> torch.Tensor:
        return self._keep(_block_mass(tiles.by_block()).sum(3), tiles.tile_blocks)

    def _keep(self, mass: torch.Tensor, tile_blocks: torch.Tensor) -> torch.Tensor:
        """[..., N, M] bool from mass [..., N, M] and the number of each tile's block [N]."""
        blocks, own = torch.arange(mass.shape[-1], device=mass.device), tile_blocks[:, None]
        is_forced = (blocks == 0) | (blocks == own)
        order = mass.masked_fill(is_forced, float("inf")).argsort(
            dim=-1, descending=True, stable=True
        )
        is_within = self.is_within_budget(mass.gather(-1, order), own + 1)
        is_kept = torch.zeros_like(is_within).scatter(-1, order, is_within)
        return (is_kept & (blocks <= own)) | is_forced


def _prefill_mass(view: PrefillView) -> torch.Tensor:
    """[Hkv, N, M] float32 mean share of a tile's attention that each block holds."""
    keys, size = view.gather_keys().float(), view.block_size
    hidden = torch.ones(size, size, dtype=torch.bool, device=keys.device).triu(1)
    masses = []
    for tile in range(view.num_tiles):  # one at a time: the scores of all need too much memory
        query = view.query[tile * size : (tile + 1) * size].unflatten(1, (view.num_kv_heads, -1))
        stop = view.position + tile * size + query.shape[0]
        scores = torch.einsum("thgd,hkd->hgtk", query.float() * view.scale, keys[:, :stop])
        rows = query.shape[0]
        scores[..., -rows:].masked_fill_(hidden[:rows, :rows], float("-inf"))
        scores = functional.pad(scores, (0, -stop % size), value=float("-inf"))
        mass = _block_mass(scores.unflatten(-1, (-1, size))).mean((1, 2))
        masses.append(functional.pad(mass, (0, view.num_blocks - mass.shape[-1])))
    return torch.stack(masses, 1)


def _decode_mass(view: DecodeView) -> torch.Tensor:
    """[Hkv, R, M] float32 mean share of a row's attention that each page holds."""
    queries = view.query_groups().float() * view.scale
    slots = torch.arange(view.max_pages * view.page_size, device=view.query.device)
    is_hidden = (slots >= view.kv_lens[:, None]).unflatten(1, (-1, view.page_size))
    masses = []
    for row in range(queries.shape[0]):  # one at a time: a copy of all keys needs too much memory
        keys = view.keys[view.pages[row]].float()
        scores = torch.einsum("hgd,mkhd->hgmk", queries[row], keys)
        masses.append(_block_mass(scores.masked_fill_(is_hidden[row], float("-inf"))).mean(1))
    return torch.stack(masses, 1)


def _block_mass(scores: torch.Tensor) -> torch.Tensor:
    """[..., M] float32 softmax of [..., M, keys] over both, added up by block; 0 if all -inf."""
    lowest, tiny = torch.finfo(torch.float32).min, torch.finfo(torch.float32).tiny
    weights = (scores - scores.amax((-1, -2), keepdim=True).clamp(min=lowest)).exp_().sum(-1)
    # A running sum, because zeros after it leave it as it is to the last bit: a chunk or a batch
    # that reaches further then decides alike.
    return weights / weights.cumsum(-1)[..., -1:].clamp(min=tiny)
