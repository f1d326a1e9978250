"""Instruments around an attention implementation and around a method's decisions."""

import copy
import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from sparse_methods.kernels import Implementation
from sparse_methods.kernels.operation import AttentionInputs, AttentionOutputs
from sparse_methods.method import SparseAttentionMethod
from sparse_methods.views import Phase

_HOOKS = {
    "select_prefill": Phase.PREFILL,
    "score_pages": Phase.PREFILL,
    "select_decode": Phase.DECODE,
    "adapt_thresholds": None,  # its view says which
}


class RecallProbe:
    """An implementation that also measures which part of the attention's mass was kept.

    Recall is exp(lse - lse_dense) of a row and head, on the same queries and keys; dense attention
    is run again for it, in every ``stride``-th layer and in other layers at the next step.

    Attributes:
        is_active: Whether anything is measured now.
    """

    def __init__(self, implementation: Implementation, num_layers: int, stride: int = 4) -> None:
        self._implementation = implementation
        self._num_layers = num_layers
        self._stride = stride
        self.is_active = False
        self.reset()

    def reset(self) -> None:
        """Forget what was measured."""
        self._num_calls = 0
        self._sums: dict[Phase, torch.Tensor] = {}
        self._counts: dict[Phase, int] = defaultdict(int)

    def __call__(self, inputs: AttentionInputs) -> AttentionOutputs:
        """Run the implementation."""
        outputs = self._implementation(inputs)
        if self.is_active and not _is_capturing():
            step, layer = divmod(self._num_calls, self._num_layers)
            self._num_calls += 1
            if (step + layer) % self._stride == 0:
                self._measure(inputs, outputs)
        return outputs

    def recall(self, phase: Phase) -> float | None:
        """Mean over the rows, heads and layers measured; None if there were none."""
        if not self._counts[phase]:
            return None
        return float(self._sums[phase]) / self._counts[phase]

    def _measure(self, inputs: AttentionInputs, outputs: AttentionOutputs) -> None:
        dense = dataclasses.replace(inputs, lists=None, log_thresholds=None, diagonal_first=None)
        gap = outputs.lse.double() - self._implementation(dense).lse
        kept = gap.exp().clamp(max=1.0)  # rounding may leave a sparse sum the larger one
        tiles = inputs.tiles.tiles
        is_decode = torch.tensor([tile.is_decode for tile in tiles for _ in range(tile.num_rows)])
        rows = {Phase.PREFILL: ~is_decode, Phase.DECODE: is_decode}
        for phase, chosen in rows.items():
            count = int(chosen.sum()) * kept.shape[1]
            if count:
                weights = chosen.to(kept.device, kept.dtype)[:, None]
                self._sums[phase] = self._sums.get(phase, 0.0) + (kept * weights).sum()
                self._counts[phase] += count


class SelectionClock:
    """Time that a method's decisions take, on the device if there is one."""

    def __init__(self, device: torch.device | str) -> None:
        self._is_cuda = torch.device(device).type == "cuda"
        self.reset()

    def reset(self) -> None:
        """Start from zero."""
        self._seconds: dict[Phase, float] = defaultdict(float)
        self._events: list[tuple[Phase, torch.cuda.Event, torch.cuda.Event]] = []
        self._measured: set[Phase] = set()

    def seconds(self, phase: Phase) -> float | None:
        """Seconds of a phase so far; None if nothing of it was timed. Waits for the device."""
        if self._is_cuda:
            torch.cuda.synchronize()
        for measured, start, stop in self._events:
            self._seconds[measured] += start.elapsed_time(stop) / 1e3
        self._events = []
        return self._seconds[phase] if phase in self._measured else None

    def timed(self, method: SparseAttentionMethod) -> SparseAttentionMethod:
        """The same method, whose decisions are timed."""
        cls = type(method)
        hooks = {
            name: self._wrap(getattr(cls, name), phase)
            for name, phase in _HOOKS.items()
            if getattr(cls, name) is not getattr(SparseAttentionMethod, name)
        }
        timed = copy.copy(method)  # with what it was bound to
        timed.__class__ = type(cls.__name__, (cls,), hooks)
        return timed

    def _wrap(self, hook: Callable[..., Any], phase: Phase | None) -> Callable[..., Any]:
        def run(method: SparseAttentionMethod, view: Any) -> Any:  # noqa: ANN401 - any hook's
            if _is_capturing():
                return hook(method, view)
            now = phase or view.phase
            self._measured.add(now)
            if self._is_cuda:
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                answer = hook(method, view)
                stop.record()
                self._events.append((now, start, stop))
                return answer
            began = time.perf_counter()
            answer = hook(method, view)
            self._seconds[now] += time.perf_counter() - began
            return answer

        return run


def _is_capturing() -> bool:
    """Whether a CUDA graph is being captured, in which nothing can be measured."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
