"""Oracle top-k: read the blocks that hold most of the attention, known from all scores.

Source: OracleTopK of xAlg-ai/sparse-attention-hub (commit 1a048c9).

Departures: those of ``OracleMethod``; k is a share of the blocks that the tile sees, among which
the first block and the query's own count.
"""

import torch
from pydantic import Field
from typing_extensions import override

from sparse_methods.block_method import BlockKnobs
from sparse_methods.oracle import OracleMethod
from sparse_methods.registry import register_sparse_method


@register_sparse_method("oracle_topk", version="v1")
class OracleTopK(OracleMethod):
    """The best blocks by exact attention mass, a fixed share of them: what to compare with.

    Use it to see what the best list of a fixed size can keep; deciding costs more than it saves.
    """

    class Knobs(BlockKnobs):
        """How much is read."""

        keep_ratio: float = Field(
            0.4, gt=0, le=1, description="Share of the visible blocks that is read."
        )

    knobs: Knobs

    @property
    @override
    def name(self) -> str:
        return "oracle_topk"

    @override
    def is_within_budget(self, mass: torch.Tensor, num_visible: torch.Tensor) -> torch.Tensor:
        budget = (num_visible.double() * self.knobs.keep_ratio).round()
        ranks = torch.arange(mass.shape[-1], device=mass.device)
        return (ranks < budget).expand_as(mass)
