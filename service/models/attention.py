"""THE SEAM: Hugging Face modeling code calls in here for every attention layer.

Each call writes the step's keys and values into the paged cache, asks every method group for its
selection, and runs one kernel for the whole mixed batch. The batch lives on a ``PagedAttention``
object for the duration of one forward; nothing is global.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from sparse_methods.kernels import Implementation
from sparse_methods.kernels.operation import (
    AttentionInputs,
    BlockLists,
    LayerGeometry,
    PageTable,
    QueryTiles,
)
from sparse_methods.method import DecodeView, PrefillView, SparseAttentionMethod

NAME = "sparseserve"


@dataclass(frozen=True)
class TileGroup:
    """Tiles of one method and one phase.

    Attributes:
        tiles: [n] int64, their places in the batch's tiles.
        rows: [t] int64, their query rows in the packed batch.
        offsets: [n + 1] int32, first row of each tile within ``rows``.
        blocks: [n] int32, number of the block each tile lies in.
        kv_lens: [n] int32, keys visible to each tile's last row.
        max_blocks: Most blocks any of the tiles can see.
    """

    method: SparseAttentionMethod
    is_decode: bool
    tiles: torch.Tensor
    rows: torch.Tensor
    offsets: torch.Tensor
    blocks: torch.Tensor
    kv_lens: torch.Tensor
    max_blocks: int


@dataclass(frozen=True)
class AttentionBatch:
    """What the attention layers need to know of one engine step.

    Attributes:
        slot_mapping: [T] int64, flat slot of each packed row's key and value.
        page_table: Pages of the R requests.
        groups: Tiles of methods that select; all other tiles read every visible block.
        log_thresholds: [N] float32, see ``AttentionInputs``.
        counter_rows: [N] int64, row of the statistics each tile adds to: slot * 2 + phase.
    """

    slot_mapping: torch.Tensor
    page_table: PageTable
    tiles: QueryTiles
    groups: Sequence[TileGroup]
    log_thresholds: torch.Tensor | None
    counter_rows: torch.Tensor


class PagedAttention:
    """The attention of one loaded model over its paged KV cache.

    Attributes:
        block_counters: [layers, slots * 2, max heads, 3] int64, what each running request read.
        element_counters: [layers, slots * 2, 2] int64, elements of keys and values read, and dense.
        heartbeat: When a layer last ran, by the monotonic clock: a long step shows that it lives.
    """

    def __init__(
        self,
        geometries: Sequence[LayerGeometry],
        caches: Sequence[tuple[torch.Tensor, torch.Tensor]],
        implementation: Implementation,
        num_slots: int,
    ) -> None:
        self._geometries = list(geometries)
        self._caches = list(caches)
        self._implementation = implementation
        self._batch: AttentionBatch | None = None
        self.heartbeat = time.monotonic()
        device = caches[0][0].device
        max_heads = max(geometry.num_heads for geometry in geometries)
        shape = (len(geometries), num_slots * 2)
        self.block_counters = torch.zeros(*shape, max_heads, 3, dtype=torch.int64, device=device)
        self.element_counters = torch.zeros(*shape, 2, dtype=torch.int64, device=device)

    @contextmanager
    def running(self, batch: AttentionBatch) -> Iterator[None]:
        """Make ``batch`` the one that the layers attend to."""
        self._batch = batch
        try:
            yield
        finally:
            self._batch = None

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
        key_cache.flatten(0, 1).index_copy_(0, batch.slot_mapping, keys.to(key_cache.dtype))
        value_cache.flatten(0, 1).index_copy_(0, batch.slot_mapping, values.to(value_cache.dtype))
        outputs = self._implementation(
            AttentionInputs(
                query=query,
                keys=key_cache,
                values=value_cache,
                page_table=batch.page_table,
                tiles=batch.tiles,
                geometry=self._geometries[layer],
                lists=self._select(layer, query, batch),
                log_thresholds=batch.log_thresholds,
                sinks=sinks if self._geometries[layer].has_sinks else None,
            )
        )
        num_heads = self._geometries[layer].num_heads
        counters = self.block_counters[layer, :, :num_heads]
        counters.index_add_(0, batch.counter_rows, outputs.blocks)
        self.element_counters[layer].index_add_(0, batch.counter_rows, outputs.kv_elements)
        return outputs.output

    def _select(self, layer: int, query: torch.Tensor, batch: AttentionBatch) -> BlockLists | None:
        """Ask each group; tiles whose method answers None read every visible block."""
        num_kv_heads = self._geometries[layer].num_kv_heads
        answers = []
        for group in batch.groups:
            selection = _ask(group, layer, query, num_kv_heads, batch.tiles.block_size)
            if selection is not None:
                answers.append((group, selection))
        if not answers:
            return None
        num_tiles, device = len(batch.tiles.tiles), query.device
        capacity = max(lists.indices.shape[2] for _, lists in answers)
        indices = torch.zeros(num_tiles, num_kv_heads, capacity, dtype=torch.int32, device=device)
        counts = torch.full((num_tiles, num_kv_heads), -1, dtype=torch.int32, device=device)
        for group, lists in answers:
            indices[group.tiles, :, : lists.indices.shape[2]] = lists.indices
            counts[group.tiles] = lists.counts
        return BlockLists(indices, counts)


def _ask(
    group: TileGroup, layer: int, query: torch.Tensor, num_kv_heads: int, block_size: int
) -> BlockLists | None:
    rows = query[group.rows]
    if group.is_decode:
        view = DecodeView(rows, group.kv_lens, num_kv_heads, block_size, group.max_blocks, layer)
        pages = group.method.select_decode(view)
        return None if pages is None else BlockLists(pages.indices, pages.counts)
    blocks = group.method.select_prefill(
        PrefillView(
            query=rows,
            tile_offsets=group.offsets,
            tile_blocks=group.blocks,
            num_kv_heads=num_kv_heads,
            block_size=block_size,
            max_blocks=group.max_blocks,
            layer=layer,
        )
    )
    return None if blocks is None else BlockLists(blocks.indices, blocks.counts)


@dataclass(frozen=True)
class BoundLayer:
    """What an attention module carries to find its cache and its batch."""

    attention: PagedAttention
    index: int


def bind(attention: PagedAttention, modules: Sequence[nn.Module]) -> None:
    """Tell each attention module, in execution order, which layer of ``attention`` it is."""
    for index, module in enumerate(modules):
        module.sparseserve_layer = BoundLayer(attention, index)  # type: ignore[assignment]


def _attention_function(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: object,
    **kwargs: Any,  # noqa: ANN401 - what a model passes is its own affair; discovery looked at it
) -> tuple[torch.Tensor, None]:
    """Bridge from the attention interface: heads come before tokens, and go back after them.

    The module was bound by ``bind``; query is [1, Hq, T, D], key and value [1, Hkv, T, D]; no mask
    comes, as no mask function is registered under our name. Returns [1, T, Hq, Dv].
    """
    if attention_mask is not None:
        raise RuntimeError(f"a mask reached {type(module).__name__}; its batch would be wrong")
    bound: BoundLayer = module.sparseserve_layer  # type: ignore[assignment]
    rows, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    output = bound.attention.forward(bound.index, rows, keys, values, kwargs.get("s_aux"))
    return output.unsqueeze(0), None


AttentionInterface.register(NAME, _attention_function)
