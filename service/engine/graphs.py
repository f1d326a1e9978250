"""CUDA graphs of decode steps: the whole forward of a shape as one launch."""

import logging
from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch

from service.engine.decode_step import DecodeShape, DecodeStep
from service.engine.scheduler import Chunk
from service.models.attention import AttentionBatch

Forward = Callable[[torch.Tensor, torch.Tensor, AttentionBatch, torch.Tensor], torch.Tensor]

_MAX_GRAPHS = 64  # shapes kept; the one used longest ago makes room
_NUM_WARM_UPS = 2

logger = logging.getLogger(__name__)


class DecodeGraphs:
    """Captures each shape of decode step when it first comes, and replays it from then on.

    Args:
        forward: Computes [rows, V] logits from token ids [T], positions [T], the batch, and the
            rows wanted.
        new_step: Makes the buffers of a shape.
    """

    def __init__(self, forward: Forward, new_step: Callable[[DecodeShape], DecodeStep]) -> None:
        self._forward = forward
        self._new_step = new_step
        self._graphs: OrderedDict[DecodeShape, _Captured] = OrderedDict()
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, chunks: Items[Chunk]) -> torch.Tensor:
        """[S, V] logits of the chunks, valid until the next step of the same shape."""
        shape = DecodeShape.of(chunks)
        captured = self._graphs.get(shape)
        if captured is None:
            captured = self._graphs[shape] = self._capture(shape)
            if len(self._graphs) > _MAX_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(shape)
        captured.step.fill(chunks)
        captured.graph.replay()
        return captured.logits[: len(chunks)]

    def _capture(self, shape: DecodeShape) -> "_Captured":
        step = self._new_step(shape)
        step.fill([])  # padding only: warming up writes and counts where nobody looks
        rows = torch.arange(shape.num_rows, device=step.token_ids.device)

        def forward() -> torch.Tensor:
            return self._forward(step.token_ids, step.positions, step.batch(), rows)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_NUM_WARM_UPS):
                forward()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on asking the device: the watchdog of NCCL does, where ranks share
        # the model.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = forward()
        logger.debug("captured a decode step of %s rows, %s pages", shape.num_rows, shape.num_pages)
        return _Captured(step, rows, graph, logits)


@dataclass(frozen=True)
class _Captured:
    """A graph with what it reads and writes: memory that must live as long as the graph."""

    step: DecodeStep
    rows: torch.Tensor
    graph: torch.cuda.CUDAGraph
    logits: torch.Tensor
