"""One model on one device: runs a step, keeps the statistics of whoever runs."""

from collections.abc import Sequence as Items

import torch
from torch import nn

from service.engine.batch import Batch, build_batch
from service.engine.kv_cache import allocate_caches
from service.engine.scheduler import Chunk
from service.engine.sequence import Sequence
from service.models.attention import PagedAttention, bind
from sparse_methods.kernels import pick_implementation
from sparse_methods.kernels.operation import LayerGeometry
from sparse_methods.statistics import PHASES, RequestStatistics, read_statistics


class ModelRunner:
    """Turns scheduled chunks into logits.

    Args:
        model: A causal LM whose attention implementation is ours.
        modules: Its attention modules in execution order, with the geometry of each.
        num_pages: Pages of the KV cache.
        block_size: Tokens of a page and of a block.
        num_slots: Sequences that may run at once.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Items[tuple[nn.Module, LayerGeometry]],
        *,
        num_pages: int,
        block_size: int,
        num_slots: int,
    ) -> None:
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.geometries = [geometry for _, geometry in modules]
        self.num_pages = num_pages
        self.block_size = block_size
        self.attention_name, implementation = pick_implementation()
        caches = allocate_caches(self.geometries, num_pages, block_size, self.dtype, self.device)
        self._model = model
        self._attention = PagedAttention(self.geometries, caches, implementation, num_slots)
        bind(self._attention, [module for module, _ in modules])

    @property
    def heartbeat(self) -> float:
        """When a layer last ran, by the monotonic clock."""
        return self._attention.heartbeat

    @torch.inference_mode()
    def run(self, chunks: Items[Chunk]) -> tuple[torch.Tensor, list[Sequence]]:
        """Compute the chunks; return [S, V] logits of the S sequences that get a next token."""
        for chunk in chunks:
            if chunk.start == 0:
                self._reset_statistics(chunk.sequence)
        batch = build_batch(chunks, self.block_size, self.device)
        # A step that completes nobody still needs one row: an empty index keeps no logits.
        return self._forward(batch, batch.last_rows), batch.completed

    @torch.inference_mode()
    def run_all_logits(self, chunks: Items[Chunk]) -> torch.Tensor:
        """Compute the chunks; return [T, V] logits of every packed row."""
        batch = build_batch(chunks, self.block_size, self.device)
        return self._forward(batch, torch.arange(len(batch.token_ids), device=self.device))

    def statistics(self, sequence: Sequence) -> RequestStatistics:
        """What the sequence's attention read since it was (last) started."""
        if sequence.slot is None:
            return RequestStatistics()
        first = sequence.slot * len(PHASES)
        rows = slice(first, first + len(PHASES))
        return read_statistics(
            self._attention.block_counters[:, rows],
            self._attention.element_counters[:, rows] * self.dtype.itemsize,
            [geometry.num_heads for geometry in self.geometries],
        )

    def _forward(self, batch: Batch, rows: torch.Tensor) -> torch.Tensor:
        with self._attention.running(batch.attention):
            output = self._model(
                input_ids=batch.token_ids[None],
                position_ids=batch.positions[None],
                attention_mask=None,
                use_cache=False,
                logits_to_keep=rows,
            )
        logits: torch.Tensor = output.logits[0]
        return logits

    def _reset_statistics(self, sequence: Sequence) -> None:
        """A sequence that starts, or starts over after preemption, counts from zero."""
        if sequence.slot is not None:
            self._attention.forget(sequence.slot)
