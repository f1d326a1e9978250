"""Moving small tensors between host and device without anybody waiting for the copy."""

from typing import Any

import torch


def to_device(
    values: list[Any] | torch.Tensor, device: torch.device, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Numbers of the host as a tensor on the device.

    Memory that is not pinned would have to be copied before the call returns, which is when the
    device has done all the work before it. The allocator of pinned memory keeps the source until
    the copy has been made.
    """
    tensor = torch.as_tensor(values, dtype=dtype)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in the host's memory, to be read once a ``Landmark`` set after it is reached."""
    return tensor.to("cpu", non_blocking=True)


class Landmark:
    """A moment in a device's work: set behind all that was asked of it so far."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> None:
        """Return when the device has come this far; at once where there is nothing to wait for."""
        if self._event is not None:
            self._event.synchronize()
