"""Streaming: read the first blocks and the most recent ones, whatever the query asks.

Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks", ICLR 2024,
arXiv:2309.17453, section 3; as a prefill mask it is the A-shape of Jiang et al., "MInference 1.0",
NeurIPS 2024, arXiv:2407.02490, section 3.

Departures: whole blocks instead of tokens, so the window begins at a block's first key; positions
are not re-assigned, so a model does not go beyond its trained length by this.
"""

from typing import ClassVar

import torch
from pydantic import Field
from typing_extensions import override

from sparse_methods.block_method import BlockKnobs, BlockMethod, ScoreTiles
from sparse_methods.registry import register_sparse_method
from sparse_methods.views import BlockSelection, DecodeView, PageSelection, PrefillView


@register_sparse_method("streaming", version="v1")
class Streaming(BlockMethod):
    """Attention sinks and a recent window: constant cost per query, blind to the middle.

    Use it where only the recent text matters; facts further back are lost.
    """

    source: ClassVar[str] = "arXiv:2309.17453"

    class Knobs(BlockKnobs):
        """How much of both ends is read."""

        sink_blocks: int = Field(
            1, ge=1, le=64, description="First blocks of the sequence that are always read, blocks."
        )
        window_blocks: int = Field(
            4,  # 512 tokens, the window of the authors' code
            ge=1,
            le=4096,
            description="Most recent blocks that are read, the query's own included, blocks.",
        )

    selects_per_layer: ClassVar[bool] = False

    knobs: Knobs

    @property
    @override
    def name(self) -> str:
        return "streaming"

    @override
    def select_prefill(self, view: PrefillView) -> BlockSelection:
        return BlockSelection(*self._per_kv_head(view.tile_blocks, view.num_kv_heads))

    @override
    def select_decode(self, view: DecodeView) -> PageSelection:
        return PageSelection(*self._per_kv_head(view.own_pages, view.num_kv_heads))

    @override
    def keep_from_scores(self, tiles: ScoreTiles) -> torch.Tensor:
        indices, counts = self._keep(tiles.tile_blocks)
        is_used = torch.arange(indices.shape[1], device=indices.device) < counts[:, None]
        spare = torch.full_like(indices, tiles.num_blocks)  # a column for entries not in use
        table = torch.zeros(tiles.num_tiles, tiles.num_blocks + 1, device=indices.device)
        table.scatter_(1, torch.where(is_used, indices, spare).long(), 1.0)
        return table[:, :-1].bool().expand(*tiles.scores.shape[:2], -1, -1)

    def _keep(self, own_blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The rule: blocks read by queries of the blocks [N], ascending, and how many.

        Returns:
            [N, C] int32 block numbers, of which the first [N] int32 are in use. The capacity never
            depends on the lengths, so a captured graph stays valid while a sequence grows.
        """
        sink, window = self.knobs.sink_blocks, self.knobs.window_blocks
        own = own_blocks.to(torch.int32)
        window_start = (own - window + 1).clamp(min=sink)  # a sink is never listed twice
        slots = torch.arange(sink + window, dtype=torch.int32, device=own.device)
        recent = window_start[:, None] + slots - sink
        return torch.where(slots < sink, slots, recent), sink + own - window_start + 1

    def _per_kv_head(
        self, own_blocks: torch.Tensor, num_kv_heads: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        indices, counts = self._keep(own_blocks)
        return indices[:, None].repeat(1, num_kv_heads, 1), counts[:, None].repeat(1, num_kv_heads)
