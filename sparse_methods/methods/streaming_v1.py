"""Streaming: read the first blocks and the most recent ones, whatever the query asks.

Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks", ICLR 2024,
arXiv:2309.17453, section 3; as a prefill mask it is the A-shape of Jiang et al., "MInference 1.0",
NeurIPS 2024, arXiv:2407.02490, section 3.

Departures: whole blocks instead of tokens, so the window begins at a block's first key; positions
are not re-assigned, so a model does not go beyond its trained length by this.
"""

from typing import Any, ClassVar

import torch
from pydantic import Field
from typing_extensions import override

from sparse_methods.method import (
    BlockSelection,
    DecodeView,
    PageSelection,
    PrefillView,
    SparseAttentionMethod,
)
from sparse_methods.method import Knobs as BaseKnobs
from sparse_methods.registry import register_sparse_method

_SCORE_BLOCK = 128  # tokens of a block where scores are materialised; serving uses the engine's


@register_sparse_method("streaming", version="v1")
class Streaming(SparseAttentionMethod):
    """Attention sinks and a recent window: constant cost per query, blind to the middle."""

    source: ClassVar[str] = "arXiv:2309.17453"

    class Knobs(BaseKnobs):
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
        own_pages = (view.kv_lens - 1) // view.page_size
        return PageSelection(*self._per_kv_head(own_pages, view.num_kv_heads))

    @override
    def calculate_sparsity(
        self, attention_scores: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        num_queries, num_keys = attention_scores.shape[-2:]
        if num_queries > num_keys:
            raise ValueError(
                f"Queries are the suffix of the keys, got {num_queries} queries, {num_keys} keys."
            )
        keys = torch.arange(num_keys, device=attention_scores.device)
        rows = keys[num_keys - num_queries :]  # absolute positions of the queries
        first, last = int(rows[0]) // _SCORE_BLOCK, (num_keys - 1) // _SCORE_BLOCK
        tiles = torch.arange(first, last + 1, device=rows.device)
        is_kept = self._is_kept(tiles, last + 1)  # [N, blocks]
        mask = is_kept[rows // _SCORE_BLOCK - first][:, keys // _SCORE_BLOCK]
        mask = mask & (keys <= rows[:, None])
        total, kept = int((tiles + 1).sum()), int(is_kept.sum())
        stats = {
            "sparsity": 1.0 - kept / total,
            "total_blocks": total,
            "sparse_blocks": total - kept,
            "phase": "decode" if num_queries == 1 else "prefill",
            "sample_length": num_keys,
        }
        return mask.expand_as(attention_scores), stats

    @override
    def apply_sparsity(
        self, attention_scores: torch.Tensor, sparse_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        if sparse_mask is None:
            sparse_mask, _ = self.calculate_sparsity(attention_scores)
        lowest = torch.finfo(attention_scores.dtype).min
        return attention_scores.masked_fill(~sparse_mask, lowest)

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

    def _is_kept(self, own_blocks: torch.Tensor, num_blocks: int) -> torch.Tensor:
        """[N, num_blocks] bool: the same rule as a table."""
        indices, counts = self._keep(own_blocks)
        is_used = torch.arange(indices.shape[1], device=indices.device) < counts[:, None]
        table = torch.zeros(
            len(own_blocks), num_blocks + 1, dtype=torch.bool, device=indices.device
        )
        spare = torch.full_like(indices, num_blocks)  # a column for entries that are not in use
        return table.scatter_(1, torch.where(is_used, indices, spare).long(), True)[:, :-1]  # noqa: FBT003 - torch's own signature
