"""The paged KV cache: its tensors, and which pages are whose."""

import itertools
import math
from collections.abc import Iterator
from collections.abc import Sequence as Items

import numpy as np
import torch

from service.engine.prefix import PageKey
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
    """Hands out physical pages, and finds those again whose keys and values somebody else needs.

    A page is owned, by one sequence or by several that share it, or it is free. A free page is
    blank or idle: an idle one still holds what its key says, until all blank ones are gone and it
    is the least recently used. Only full pages of prompts have keys, and nobody writes to them.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        # Dicts keep order and find a page by number. The page after a sequence's last one is
        # preferred, because pages side by side are read without a copy on a CPU.
        self._blank = dict.fromkeys(range(num_pages))
        self._idle: dict[int, None] = {}  # least recently used first
        self._num_owners = [0] * num_pages
        self._keys: dict[int, PageKey] = {}
        self._found: dict[PageKey, int] = {}

    @property
    def num_free(self) -> int:
        """Pages nobody owns."""
        return len(self._blank) + len(self._idle)

    @property
    def num_used(self) -> int:
        """Pages owned by sequences; one that several share counts once."""
        return self.num_pages - self.num_free

    @property
    def num_idle(self) -> int:
        """Free pages that can still be found."""
        return len(self._idle)

    def num_missing(self, sequence: Sequence, num_tokens: int) -> int:
        """Pages that a sequence lacks to hold ``num_tokens`` tokens in all."""
        return max(0, -(-num_tokens // self.page_size) - len(sequence.pages))

    def try_reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give ``sequence`` pages for ``num_tokens`` more tokens, or change nothing."""
        num_missing = self.num_missing(sequence, sequence.num_computed_tokens + num_tokens)
        if num_missing > self.num_free:
            return False
        self._evict(num_missing - len(self._blank))
        for _ in range(num_missing):
            following = sequence.pages[-1] + 1 if sequence.pages else -1
            page = following if following in self._blank else next(iter(self._blank))
            del self._blank[page]
            self._num_owners[page] = 1
            sequence.pages.append(page)
        return True

    def reuse(self, sequence: Sequence) -> None:
        """Give a sequence what is found of its prompt, if it has computed nothing yet.

        It may be asked again as long as the sequence has no other pages: more may be found by then.
        """
        if sequence.num_own_tokens or len(sequence.pages) > self._num_cached(sequence):
            return
        for page in self._find(sequence):
            self._idle.pop(page, None)
            self._num_owners[page] += 1
            sequence.pages.append(page)
        sequence.num_cached_tokens = len(sequence.pages) * self.page_size
        sequence.num_computed_tokens = sequence.num_cached_tokens

    def taken_over(self, sequence: Sequence) -> list[int]:
        """Pages of a sequence that others computed, or compute."""
        return sequence.pages[: self._num_cached(sequence)]

    def num_shared(self, sequence: Sequence) -> int:
        """Pages that ``reuse`` would find in the hands of others, so that they cost no free one."""
        return sum(self._num_owners[page] > 0 for page in self._find(sequence))

    def publish(self, sequence: Sequence, start: int, stop: int) -> None:
        """Let others find the full prompt pages among tokens [start, stop).

        The step that writes them was launched: whoever reads them comes later on the device.
        """
        prefix = sequence.prefix
        if prefix is None:
            return
        for index in range(start // self.page_size, min(stop // self.page_size, prefix.num_pages)):
            key, page = prefix.key(index), sequence.pages[index]
            if key not in self._found and page not in self._keys:
                self._found[key] = page
                self._keys[page] = key

    def retract(self, sequence: Sequence) -> None:
        """Let nobody find the pages of a sequence that failed; who shares them keeps them."""
        for page in sequence.pages:
            self._forget(page)

    def retract_written(self, sequence: Sequence, start: int, stop: int) -> set[int]:
        """Let nobody find what ``publish`` was given, whoever owns it by now; these pages."""
        prefix = sequence.prefix
        if prefix is None:
            return set()
        indices = range(start // self.page_size, min(stop // self.page_size, prefix.num_pages))
        found = {self._found.get(prefix.key(index)) for index in indices}
        pages = {page for page in found if page is not None}
        for page in pages:
            self._forget(page)
            if page in self._idle:
                del self._idle[page]
                self._blank[page] = None
        return pages

    def release(self, sequence: Sequence) -> None:
        """Take back every page of ``sequence``; what nobody else owns is free."""
        blank = []
        # From the end, so that what is evicted first is a page that no page left needs before it.
        for page in reversed(sequence.pages):
            self._num_owners[page] -= 1
            if self._num_owners[page] == 0 and page in self._keys:
                self._idle[page] = None
            elif self._num_owners[page] == 0:
                blank.append(page)
        self._blank.update(dict.fromkeys(reversed(blank)))
        sequence.pages.clear()

    def _num_cached(self, sequence: Sequence) -> int:
        return sequence.num_cached_tokens // self.page_size

    def _find(self, sequence: Sequence) -> Iterator[int]:
        """Pages that hold what a sequence would compute next, one after the other."""
        prefix = sequence.prefix
        if prefix is None:
            return
        stop = min(prefix.num_reusable, sequence.most_cached_tokens // self.page_size)
        for index in range(self._num_cached(sequence), stop):
            page = self._found.get(prefix.key(index))
            if page is None:
                return
            yield page

    def _evict(self, num_pages: int) -> None:
        """Make the least recently used idle pages blank, to be handed out in ascending order."""
        if num_pages <= 0:
            return
        evicted = sorted(itertools.islice(self._idle, num_pages))
        for page in evicted:
            del self._idle[page]
            self._forget(page)
        self._blank.update(dict.fromkeys(evicted))

    def _forget(self, page: int) -> None:
        key = self._keys.pop(page, None)
        if key is not None:
            del self._found[key]
