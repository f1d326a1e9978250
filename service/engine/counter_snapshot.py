"""The counters of all slots as they were at one moment, while later steps go on counting."""

from collections.abc import Sequence as Items

import torch


class CounterSnapshot:
    """A copy of tensors whose first axis is layers and whose second is rows of statistics.

    It is taken in the order of the device's work, and read beside that work: reading waits for the
    moment of the copy, not for what was launched after it.

    Args:
        counters: The tensors, which stay where they are; any shape [layers, rows, ...].
    """

    def __init__(self, counters: Items[torch.Tensor]) -> None:
        self._counters = list(counters)
        self._kept = [torch.empty_like(tensor) for tensor in counters]
        self._stream: torch.cuda.Stream | None = None
        self._taken: torch.cuda.Event | None = None
        if self._counters[0].is_cuda:
            self._stream, self._taken = torch.cuda.Stream(), torch.cuda.Event()

    def take(self) -> None:
        """Copy what all work launched so far will have counted; nobody waits."""
        for kept, counters in zip(self._kept, self._counters, strict=True):
            kept.copy_(counters)
        if self._taken is not None:
            self._taken.record()

    def read(self, rows: slice) -> list[torch.Tensor]:
        """The rows of every tensor, in the host's memory."""
        if self._stream is None or self._taken is None:
            return [kept[:, rows].clone() for kept in self._kept]
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._taken)
            # The host waits for this copy, so the next ``take`` cannot overwrite what it reads.
            return [kept[:, rows].cpu() for kept in self._kept]
