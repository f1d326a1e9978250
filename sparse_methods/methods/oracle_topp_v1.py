"""Oracle top-p: read the fewest blocks that hold a share of the attention, known from all scores.

Source: OracleTopP of xAlg-ai/sparse-attention-hub (commit 1a048c9).

Departures: those of ``OracleMethod``; the first block and the query's own count towards p, where
the source asks for p of what is left; of blocks with equal mass at the edge the first is read, not
all.
"""

import torch
from pydantic import Field
from torch.nn import functional
from typing_extensions import override

from sparse_methods.block_method import BlockKnobs
from sparse_methods.oracle import OracleMethod
from sparse_methods.registry import register_sparse_method


@register_sparse_method("oracle_topp", version="v1")
class OracleTopP(OracleMethod):
    """The fewest blocks that hold a share of the exact attention mass: what to compare with.

    Use it to see how few blocks can hold a share of the attention; deciding costs more than it
    saves.
    """

    class Knobs(BlockKnobs):
        """How much of the attention is read."""

        p: float = Field(
            0.9, gt=0, le=1, description="Share of the attention mass that is read; 1 reads all."
        )

    knobs: Knobs

    @property
    @override
    def name(self) -> str:
        return "oracle_topp"

    @override
    def is_within_budget(self, mass: torch.Tensor, num_visible: torch.Tensor) -> torch.Tensor:
        if self.knobs.p == 1.0:
            return torch.ones_like(mass, dtype=torch.bool)  # also blocks whose mass is 0
        reached = mass.cumsum(-1)
        return functional.pad(reached, (1, -1)) < self.knobs.p * reached[..., -1:]
