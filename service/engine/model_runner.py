"""One model on one device: runs a step, keeps the statistics of whoever runs."""

from collections.abc import Sequence as Items
from dataclasses import replace

import torch
from torch import nn

from service.engine.batch import Batch, build_batch
from service.engine.counter_snapshot import CounterSnapshot
from service.engine.decode_step import DecodeShape, DecodeStep, host_tiles, is_decode_step
from service.engine.graphs import DecodeGraphs
from service.engine.kv_cache import allocate_caches
from service.engine.scheduler import Chunk
from service.engine.sequence import Sequence
from service.engine.transfer import to_device
from service.models.attention import AttentionBatch, PagedAttention
from service.models.bridge import bind
from sparse_methods.kernels import pick_cache_writer, pick_implementation, prepare
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

    Attributes:
        attention: What the attention modules of the model call.
        num_runs: How often ``run`` was begun.
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
        self.attention_name, implementation = pick_implementation("auto", self.device)
        prepare(self.attention_name, self.geometries, self.dtype, block_size, self.device)
        self._num_slots = num_slots
        # One page and one slot more than are handed out: padding rows write and count there.
        caches = allocate_caches(
            self.geometries, num_pages + 1, block_size, self.dtype, self.device
        )
        self._model = model
        self.attention = PagedAttention(
            self.geometries,
            caches,
            implementation,
            num_slots + 1,
            pick_cache_writer(self.attention_name),
        )
        bind(self.attention, [module for module, _ in modules])
        self.num_runs = 0
        self._last_tokens = torch.zeros(num_slots + 1, dtype=torch.int64, device=self.device)
        self._before_run: CounterSnapshot | None = None
        self._graphs: DecodeGraphs | None = None
        if self.device.type == "cuda":
            self._graphs = DecodeGraphs(self._forward, self.new_decode_step)

    @property
    def heartbeat(self) -> float:
        """When a layer last ran, by the monotonic clock."""
        return self.attention.heartbeat

    @property
    def answers(self) -> bool:
        """Whether the device still computes: after some faults it never does again."""
        try:
            return torch.ones(1, device=self.device).item() == 1
        except torch.OutOfMemoryError:
            return True
        except RuntimeError:
            return False

    def free_memory(self) -> None:
        """Give back what the allocator keeps although no tensor needs it."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def run(self, chunks: Items[Chunk]) -> tuple[torch.Tensor, list[Sequence]]:
        """Compute the chunks; return logits and the S sequences that get a next token.

        The logits [S + P, V] are theirs, and then those of prompt rows that are to be reported.
        """
        for chunk in chunks:
            if chunk.is_first:
                self._reset_statistics(chunk.sequence)
        self.num_runs += 1
        if self._before_run is not None:
            self._before_run.take()
        if self._graphs is not None and is_decode_step(chunks):
            return self._graphs.run(chunks), [chunk.sequence for chunk in chunks]
        batch = build_batch(chunks, self.block_size, self.device)
        return self._forward_for(batch, batch.logit_rows), batch.completed

    @torch.inference_mode()
    def keep_tokens(self, sequences: Items[Sequence], token_ids: torch.Tensor) -> None:
        """Let later runs find the tokens [S] just chosen, negative for failed rows, by slot."""
        slots = to_device([sequence.slot or 0 for sequence in sequences], self.device, torch.int64)
        self._last_tokens.index_copy_(0, slots, token_ids.clamp_min(0))

    @torch.inference_mode()
    def run_padded_step(self, chunks: Items[Chunk]) -> torch.Tensor:
        """[S, V] logits of decode chunks by the way that graphs capture, without a graph."""
        step = self.new_decode_step(DecodeShape.of(chunks))
        step.fill(chunks)
        rows = torch.arange(step.shape.num_rows, device=self.device)
        tiles = host_tiles(chunks, step.shape.num_rows)
        logits = self._forward(step.token_ids, step.positions, step.batch(tiles), rows)
        return logits[: len(chunks)]

    def forget_graphs(self) -> None:
        """Free what was captured; NCCL's communicators cannot end while a graph uses them."""
        self._graphs = None

    def new_decode_step(self, shape: DecodeShape) -> DecodeStep:
        """Buffers for decode steps of a shape."""
        return DecodeStep(
            shape,
            self.block_size,
            self.device,
            spare_page=self.num_pages,
            spare_slot=self._num_slots,
        )

    @torch.inference_mode()
    def run_all_logits(self, chunks: Items[Chunk]) -> torch.Tensor:
        """Compute the chunks; return [T, V] logits of every packed row."""
        batch = build_batch(chunks, self.block_size, self.device)
        rows = torch.arange(len(batch.token_ids), device=self.device)
        return self._forward(batch.token_ids, batch.positions, batch.attention, rows)

    @torch.inference_mode()
    def run_last_logits(self, chunks: Items[Chunk]) -> torch.Tensor:
        """Compute the chunks as ``run`` does; return [chunks, V] logits of their last rows."""
        batch = build_batch(chunks, self.block_size, self.device)
        num_tokens = torch.tensor([chunk.num_tokens for chunk in chunks])
        return self._forward_for(batch, to_device(num_tokens.cumsum(0) - 1, self.device))

    def keep_statistics(self) -> None:
        """From now on, keep the statistics as they are before each run, too."""
        counters = (self.attention.block_counters, self.attention.element_counters)
        self._before_run = CounterSnapshot(counters)

    def statistics(self, sequence: Sequence, num_runs: int | None = None) -> RequestStatistics:
        """What the sequence's attention read since it was (last) started.

        Args:
            sequence: It must run.
            num_runs: Runs that count, all but the last one at least; fewer than all need
                ``keep_statistics``. None counts all.
        """
        if sequence.slot is None:
            return RequestStatistics()
        return self.read(self.counters(sequence.slot, num_runs))

    def counters(self, slot: int, num_runs: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """What ``slot`` has counted: blocks [layers, phases, heads, 3], elements [..., 2]."""
        first = slot * len(PHASES)
        rows = slice(first, first + len(PHASES))
        if self._before_run is not None and num_runs is not None and num_runs < self.num_runs:
            blocks, elements = self._before_run.read(rows)
            return blocks, elements
        return self.attention.block_counters[:, rows], self.attention.element_counters[:, rows]

    def read(self, counters: tuple[torch.Tensor, torch.Tensor]) -> RequestStatistics:
        """What counters of this model, or of another rank's equal share of it, mean."""
        blocks, elements = counters
        heads = [geometry.num_heads for geometry in self.geometries]
        return read_statistics(blocks, elements * self.dtype.itemsize, heads)

    def _forward_for(self, batch: Batch, rows: torch.Tensor) -> torch.Tensor:
        """[S, V] logits of the packed rows [S], maybe none; nothing else of the step is read."""
        attention = replace(batch.attention, kept_rows=rows)
        return self._forward(batch.token_ids, batch.positions, attention, rows)

    def _forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        batch: AttentionBatch,
        rows: torch.Tensor,
    ) -> torch.Tensor:
        """[S, V] logits of the packed rows [S] of token ids [T] at positions [T]."""
        with self.attention.running(batch):
            output = self._model(
                input_ids=self._looked_up(token_ids)[None],
                position_ids=positions[None],
                attention_mask=None,
                use_cache=False,
                logits_to_keep=rows,
            )
        logits: torch.Tensor = output.logits[0]
        return logits

    def _looked_up(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Token ids [T] with every reference ``~slot`` replaced by the last token of that slot."""
        slots = token_ids.bitwise_not().clamp_min(0)
        return torch.where(token_ids < 0, self._last_tokens[slots], token_ids)

    def _reset_statistics(self, sequence: Sequence) -> None:
        """A sequence that starts, or starts over after preemption, counts from zero."""
        if sequence.slot is not None:
            self.attention.forget(sequence.slot)
