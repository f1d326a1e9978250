"""What was read and what was left out, as additive integers.

One *block pair* is a (query tile, block of keys) that causality and the layer's own window leave
visible, counted per query head; padding never counts.

- ``blocks_total``: visible block pairs.
- ``blocks_selected``: those handed to the kernel.
- ``blocks_skipped``: selected, but dropped inside the kernel by the threshold.
- ``density = (selected - skipped) / total``; ``sparsity = 1 - density``.
- ``kv_bytes_read`` / ``kv_bytes_dense`` (decode): bytes of keys and values read, and those that
  dense attention would have read.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from sparse_methods.views import Phase

PHASES = (Phase.PREFILL, Phase.DECODE)  # the order of every phase axis
TOTAL, SELECTED, SKIPPED = range(3)  # the order of every counter axis
READ, DENSE = range(2)  # the order of every byte axis


@dataclass(frozen=True)
class PhaseStatistics:
    """Counters of one phase; add them freely."""

    blocks_total: int = 0
    blocks_selected: int = 0
    blocks_skipped: int = 0
    kv_bytes_read: int = 0
    kv_bytes_dense: int = 0

    @property
    def density(self) -> float:
        """Share of the visible block pairs that was computed in full; 1 if there were none."""
        if self.blocks_total == 0:
            return 1.0
        return (self.blocks_selected - self.blocks_skipped) / self.blocks_total

    @property
    def sparsity(self) -> float:
        """Share of the visible block pairs that was left out: 1 - density."""
        return 1.0 - self.density

    def __add__(self, other: "PhaseStatistics") -> "PhaseStatistics":
        return PhaseStatistics(
            self.blocks_total + other.blocks_total,
            self.blocks_selected + other.blocks_selected,
            self.blocks_skipped + other.blocks_skipped,
            self.kv_bytes_read + other.kv_bytes_read,
            self.kv_bytes_dense + other.kv_bytes_dense,
        )


@dataclass(frozen=True)
class LayerStatistics:
    """Counters of one attention layer, by phase; ``heads`` holds them per query head."""

    layer: int
    phases: dict[Phase, PhaseStatistics]
    heads: tuple[dict[Phase, PhaseStatistics], ...] = ()


@dataclass(frozen=True)
class RequestStatistics:
    """Counters of one request: per layer, and summed."""

    layers: tuple[LayerStatistics, ...] = field(default=())

    def phase(self, phase: Phase) -> PhaseStatistics:
        """Sum of one phase over all layers."""
        return _sum(layer.phases[phase] for layer in self.layers)

    @property
    def overall(self) -> PhaseStatistics:
        """Sum of both phases over all layers."""
        return self.phase(Phase.PREFILL) + self.phase(Phase.DECODE)

    def __add__(self, other: "RequestStatistics") -> "RequestStatistics":
        if not self.layers or not other.layers:
            return self if self.layers else other
        pairs = zip(self.layers, other.layers, strict=True)
        return RequestStatistics(tuple(_add_layers(a, b) for a, b in pairs))


def read_statistics(
    blocks: torch.Tensor, kv_bytes: torch.Tensor, num_heads: list[int]
) -> RequestStatistics:
    """Turn one request's counters into statistics.

    Args:
        blocks: [layers, phases, max heads, 3] int64, the last axis being total, selected, skipped.
        kv_bytes: [layers, phases, 2] int64, the last axis being read, dense.
        num_heads: Query heads of each layer.
    """
    rows = zip(blocks.tolist(), kv_bytes.tolist(), num_heads, strict=True)
    return RequestStatistics(
        tuple(_layer(index, *row) for index, row in enumerate(rows)),
    )


def join_heads(parts: Sequence[RequestStatistics]) -> RequestStatistics:
    """Statistics of a request whose heads are counted in parts, in the order of the heads."""
    layers = zip(*(part.layers for part in parts), strict=True)
    return RequestStatistics(
        tuple(
            LayerStatistics(
                layer=of_layer[0].layer,
                phases={phase: _sum(part.phases[phase] for part in of_layer) for phase in PHASES},
                heads=tuple(head for part in of_layer for head in part.heads),
            )
            for of_layer in layers
        )
    )


def _layer(
    index: int, blocks: list[list[list[int]]], kv_bytes: list[list[int]], num_heads: int
) -> LayerStatistics:
    heads = tuple(
        {phase: PhaseStatistics(*blocks[p][head]) for p, phase in enumerate(PHASES)}
        for head in range(num_heads)
    )
    sums = {
        phase: _sum(head[phase] for head in heads) + PhaseStatistics(0, 0, 0, *kv_bytes[p])
        for p, phase in enumerate(PHASES)
    }
    return LayerStatistics(index, sums, heads)


def _add_layers(a: LayerStatistics, b: LayerStatistics) -> LayerStatistics:
    heads = tuple(
        {phase: x[phase] + y[phase] for phase in PHASES}
        for x, y in zip(a.heads, b.heads, strict=True)
    )
    return LayerStatistics(a.layer, {p: a.phases[p] + b.phases[p] for p in PHASES}, heads)


def _sum(parts: Iterable[PhaseStatistics]) -> PhaseStatistics:
    return sum(parts, PhaseStatistics())
