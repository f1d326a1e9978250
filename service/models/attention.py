"""THE SEAM: every attention layer of a model ends up here; ``bridge`` says how.

Each call writes the step's keys and values into the paged cache, asks every method group for its
selection, and runs one kernel for the whole mixed batch. The batch lives on a ``PagedAttention``
object for the duration of one forward; nothing is global.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn import functional

from service.models.selection import (
    Decided,
    DecodeGroup,
    Layer,
    PrefillGroup,
    ThresholdGroup,
    adapt_thresholds,
    select,
)
from sparse_methods.kernels import CacheWriter, Implementation, page_summary
from sparse_methods.kernels.operation import (
    AttentionInputs,
    AttentionOutputs,
    LayerGeometry,
    PageTable,
    QueryTiles,
)
from sparse_methods.kernels.page_summary import (
    CacheUpdate,
    PageSegments,
    allocate_summaries,
)
from sparse_methods.statistics import PHASES


@dataclass(frozen=True)
class AttentionBatch:
    """What the attention layers need to know of one engine step.

    Attributes:
        slot_mapping: [T] int64, flat slot of each packed row's key and value.
        page_table: Pages of the R requests.
        groups: Tiles of methods that select or score; others read every visible block.
        log_thresholds: [N] float32, see ``AttentionInputs``.
        adaptive: Tiles whose thresholds are set anew in every layer.
        diagonal_first: [N] bool, see ``AttentionInputs``.
        segments: The rows by page, if any method of the batch uses page summaries.
        scores_pages: Whether any method of the batch scores pages.
        kept_rows: [S] int64, packed rows whose hidden states anybody reads after the last layer's
            attention; None is all of them.
        counter_rows: [N] int64, row of the statistics each tile adds to: slot * 2 + phase.
    """

    slot_mapping: torch.Tensor
    page_table: PageTable
    tiles: QueryTiles
    counter_rows: torch.Tensor
    groups: Sequence[PrefillGroup | DecodeGroup] = ()
    log_thresholds: torch.Tensor | None = None
    adaptive: Sequence[ThresholdGroup] = ()
    diagonal_first: torch.Tensor | None = None
    segments: PageSegments | None = None
    scores_pages: bool = False
    kept_rows: torch.Tensor | None = None


class PagedAttention:
    """The attention of one loaded model over its paged KV cache.

    Attributes:
        implementation: Computes every layer; may be replaced by one that also measures.
        block_counters: [layers, slots * 2, max heads, 3] int64, what each running request read.
        element_counters: [layers, slots * 2, 2] int64, elements of keys and values read, and dense.
        heartbeat: When a layer last ran, by the monotonic clock: a long step shows that it lives.
        sum_over_ranks: Adds up what ranks with other heads counted, in place; None if all are here.
    """

    def __init__(
        self,
        geometries: Sequence[LayerGeometry],
        caches: Sequence[tuple[torch.Tensor, torch.Tensor]],
        implementation: Implementation,
        num_slots: int,
        write_cache: CacheWriter = page_summary.write_cache,
    ) -> None:
        self._geometries = list(geometries)
        self._caches = list(caches)
        self.implementation = implementation
        self._write_cache = write_cache
        self.sum_over_ranks: Callable[[torch.Tensor], torch.Tensor] | None = None
        self._batch: AttentionBatch | None = None
        self.heartbeat = time.monotonic()
        device = caches[0][0].device
        max_heads = max(geometry.num_heads for geometry in geometries)
        shape = (len(geometries), num_slots * 2)
        self.block_counters = torch.zeros(*shape, max_heads, 3, dtype=torch.int64, device=device)
        self.element_counters = torch.zeros(*shape, 2, dtype=torch.int64, device=device)
        self._summaries = [allocate_summaries(keys) for keys, _ in caches]
        self._page_scores: list[torch.Tensor] = []  # allocated when the first method scores
        self._tile_blocks = torch.zeros(0)  # [N, 3] int64, what the layers so far have counted
        # Blocks and elements that the layers of this step read, not added to the counters yet.
        self._counted: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._decided = Decided()

    @contextmanager
    def running(self, batch: AttentionBatch) -> Iterator[None]:
        """Make ``batch`` the one that the layers attend to; what they read counts when all did."""
        self._batch = batch
        self._counted = []
        self._decided = Decided()
        try:
            yield
            self._add_counted(batch.counter_rows)
        finally:
            self._batch = None
            self._counted = []
            self._decided = Decided()

    def observe(self, observer: Callable[[AttentionInputs], None]) -> None:
        """Call ``observer`` with the inputs of every later layer that runs without a graph."""
        attend = self.implementation

        def observed(inputs: AttentionInputs) -> AttentionOutputs:
            observer(inputs)
            return attend(inputs)

        self.implementation = observed

    def forget(self, slot: int) -> None:
        """Start a request over: its counters and page scores are zero again."""
        first = slot * len(PHASES)
        self.block_counters[:, first : first + len(PHASES)] = 0
        self.element_counters[:, first : first + len(PHASES)] = 0
        for scores in self._page_scores:
            scores[slot] = 0

    def forward(
        self,
        layer: int,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attend in one layer.

        Args:
            layer: Index of the attention call in execution order.
            query: [T, Hq, D], after RoPE.
            keys: [T, Hkv, D], after RoPE.
            values: [T, Hkv, Dv].
            sinks: [Hq] learned logits, if the layer has them.

        Returns:
            [T, Hq, Dv].
        """
        self.heartbeat = time.monotonic()
        batch = self._batch
        if batch is None:
            raise RuntimeError("an attention layer ran outside of an engine step")
        key_cache, value_cache = self._caches[layer]
        self._write_cache(
            CacheUpdate(
                keys=keys,
                values=values,
                key_cache=key_cache,
                value_cache=value_cache,
                slot_mapping=batch.slot_mapping,
                summaries=self._summaries[layer],
                segments=batch.segments,
            )
        )
        described = self._describe(layer, batch)
        if batch.adaptive and layer == 0:
            self._tile_blocks = torch.zeros_like(batch.counter_rows)[:, None].repeat(1, 3)
        log_thresholds = batch.log_thresholds
        if batch.adaptive and log_thresholds is not None:
            log_thresholds = adapt_thresholds(
                described, batch.adaptive, batch.tiles, log_thresholds, self._tile_blocks
            )
        outputs = self.implementation(
            AttentionInputs(
                query=query,
                keys=key_cache,
                values=value_cache,
                page_table=batch.page_table,
                tiles=batch.tiles,
                geometry=described.geometry,
                lists=select(described, query, batch.groups, len(batch.tiles.tiles), self._decided),
                log_thresholds=log_thresholds,
                diagonal_first=batch.diagonal_first,
                sinks=sinks if described.geometry.has_sinks else None,
            )
        )
        self._counted.append((outputs.blocks, outputs.kv_elements))
        if batch.adaptive:
            blocks = outputs.blocks.sum(1)
            self._tile_blocks += self.sum_over_ranks(blocks) if self.sum_over_ranks else blocks
        return outputs.output

    def kept_rows(self, layer: int) -> torch.Tensor | None:
        """[S] packed rows that go on after the attention of a layer; None is all of them.

        Of the others the last layer leaves keys and values, which is all that later rows read.
        """
        is_last = layer == len(self._geometries) - 1
        return self._batch.kept_rows if is_last and self._batch is not None else None

    def _add_counted(self, rows: torch.Tensor) -> None:
        """Add what the layers of a step read to the statistics, all layers at once."""
        if not self._counted:
            return
        blocks, elements = zip(*self._counted, strict=True)
        self.block_counters.index_add_(1, rows, _by_layer(blocks))
        self.element_counters.index_add_(1, rows, _by_layer(elements))

    def _describe(self, layer: int, batch: AttentionBatch) -> Layer:
        keys = self._caches[layer][0]
        if batch.scores_pages and not self._page_scores:
            self._page_scores = self._allocate_page_scores()
        return Layer(
            index=layer,
            num_layers=len(self._geometries),
            geometry=self._geometries[layer],
            keys=keys,
            summaries=self._summaries[layer],
            page_scores=self._page_scores[layer] if batch.scores_pages else None,
        )

    def _allocate_page_scores(self) -> list[torch.Tensor]:
        num_slots = self.block_counters.shape[1] // len(PHASES)
        return [
            torch.zeros(num_slots, keys.shape[2], keys.shape[0], device=keys.device)
            for keys, _ in self._caches
        ]


def _by_layer(counted: Sequence[torch.Tensor]) -> torch.Tensor:
    """[layers, N, ...] of one tensor per layer; a view if all are one, as without lists.

    Where layers have different numbers of heads, the missing ones read nothing.
    """
    if all(tensor is counted[0] for tensor in counted):
        return counted[0].expand(len(counted), *counted[0].shape)
    width = max(tensor.shape[1] for tensor in counted)
    if any(tensor.shape[1] != width for tensor in counted):
        counted = [functional.pad(t, (0, 0, 0, width - t.shape[1])) for t in counted]
    return torch.stack(list(counted))
