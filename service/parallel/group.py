"""The ranks of one model and what they compute together, on ``torch.distributed``."""

import datetime
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed
from torch._C._distributed_c10d import TCPStore

COLLECTIVE_TIMEOUT_S = 300  # longer than ranks may be apart, e.g. while one reads its weights
_LEAVE_TIMEOUT_S = 10.0
_HOST = "127.0.0.1"
# The same function: later releases of torch warn of its old name.
_all_gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor


class RankGroup:
    """One rank among all; every collective is called by all ranks, in the same order.

    Attributes:
        rank: From 0; rank 0 leads.
        size: Number of ranks.
        device: Where this rank computes.
    """

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        self.rank = rank
        self.size = size
        self.device = device
        self._is_apart = False

    @classmethod
    def join(cls, meeting: TCPStore, rank: int, size: int, kind: str) -> "RankGroup":
        """Wait for all ranks.

        Args:
            meeting: Of ``open_meeting`` on rank 0, of ``find_meeting`` on the others.
            rank: This one.
            size: How many there are.
            kind: cpu or cuda; each rank takes the GPU of its own number.
        """
        # One machine: nothing of this needs to be reachable from outside.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        is_cuda = kind == "cuda"
        device = torch.device(kind, rank) if is_cuda else torch.device(kind)
        if is_cuda:
            torch.cuda.set_device(device)
        distributed.init_process_group(
            "nccl" if is_cuda else "gloo",
            store=meeting,
            rank=rank,
            world_size=size,
            timeout=datetime.timedelta(seconds=COLLECTIVE_TIMEOUT_S),
            device_id=device if is_cuda else None,
        )
        return cls(rank, size, device)

    def leave(self) -> None:
        """End the group; all ranks do so at about the same time, and none waits long for others."""
        if distributed.is_initialized():
            leaving = threading.Thread(target=distributed.destroy_process_group, daemon=True)
            leaving.start()
            leaving.join(_LEAVE_TIMEOUT_S)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Let every rank compute with its own share alone for a moment: sums are its own terms."""
        self._is_apart = True
        try:
            yield
        finally:
            self._is_apart = False

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add up the ranks' tensors of one shape, in place."""
        if not self._is_apart:
            distributed.all_reduce(tensor)
        return tensor

    def join_columns(self, tensor: torch.Tensor) -> torch.Tensor:
        """[..., size * C] of the ranks' [..., C], in the order of the ranks."""
        if self._is_apart:
            return tensor
        parts = tensor.new_empty(self.size, *tensor.shape)
        _all_gather(parts.flatten(0, 1), tensor.contiguous())
        return parts.movedim(0, -2).flatten(-2)

    def follow_leader(self, tensor: torch.Tensor) -> torch.Tensor:
        """What the tensor holds on rank 0, in place."""
        distributed.broadcast(tensor, src=0)
        return tensor

    def smallest(self, number: int) -> int:
        """The least of the ranks' numbers."""
        tensor = torch.tensor(number, device=self.device)
        distributed.all_reduce(tensor, distributed.ReduceOp.MIN)
        return int(tensor)

    def agrees_on(self, value: object) -> bool:
        """Whether all ranks have the same value."""
        values: list[object] = [None] * self.size
        distributed.all_gather_object(values, value)
        return all(other == value for other in values)


def open_meeting(size: int) -> TCPStore:
    """Where the ranks find one another; on this machine only, at a port that is free."""
    listener = socket.create_server((_HOST, 0))
    port = listener.getsockname()[1]
    return TCPStore(
        _HOST,
        port,
        size,
        is_master=True,
        timeout=datetime.timedelta(seconds=COLLECTIVE_TIMEOUT_S),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def find_meeting(port: int, size: int) -> TCPStore:
    """The same, for those who come to it."""
    return TCPStore(
        _HOST,
        port,
        size,
        is_master=False,
        timeout=datetime.timedelta(seconds=COLLECTIVE_TIMEOUT_S),
        wait_for_workers=False,
    )
