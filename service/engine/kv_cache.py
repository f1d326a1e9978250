"""The paged KV cache: its tensors, and which pages are whose."""

import math
from collections.abc import Sequence as Items

import numpy as np
import torch

from service.engine.sequence import Sequence
from sparse_methods.kernels.operation import LayerGeometry


def bytes_per_token(geometries: Items[LayerGeometry], dtype: torch.dtype) -> int:
    """Bytes of keys and values that one token takes over all layers."""
    elements = sum(g.num_kv_heads * (g.head_dim + g.value_dim) for g in geometries)
    return elements * dtype.itemsize


def allocate_caches(
    geometries: Items[LayerGeometry],
    num_pages: int,
    page_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys [pages, page_size, Hkv, D] and values [pages, page_size, Hkv, Dv] of each layer.

    Pages start as zeros, so that a slot nobody wrote never holds a NaN.
    """
    caches = []
    for layer in geometries:
        shape = (num_pages, page_size, layer.num_kv_heads)
        keys = _zeros((*shape, layer.head_dim), dtype, device)
        values = _zeros((*shape, layer.value_dim), dtype, device)
        caches.append((keys, values))
    return caches


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # NumPy asks for zeroed memory, which the kernel hands out when it is first touched; torch
    # would write all of it now: seconds, and gigabytes that may never be used.
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)


class PageAllocator:
    """Hands out physical pages; every page is free or owned by exactly one sequence."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        # A dict keeps order and finds a page by number: the page after a sequence's last one is
        # preferred, because pages side by side are read without a copy on a CPU.
        self._free = dict.fromkeys(range(num_pages))

    @property
    def num_free(self) -> int:
        """Pages nobody owns."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Pages owned by sequences."""
        return self.num_pages - len(self._free)

    def try_reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give ``sequence`` pages for ``num_tokens`` more tokens, or change nothing."""
        needed = -(-(sequence.num_computed_tokens + num_tokens) // self.page_size)
        num_missing = needed - len(sequence.pages)
        if num_missing > len(self._free):
            return False
        for _ in range(num_missing):
            following = sequence.pages[-1] + 1 if sequence.pages else -1
            page = following if following in self._free else next(iter(self._free))
            del self._free[page]
            sequence.pages.append(page)
        return True

    def release(self, sequence: Sequence) -> None:
        """Take back every page of ``sequence``."""
        self._free.update(dict.fromkeys(sequence.pages))
        sequence.pages.clear()
