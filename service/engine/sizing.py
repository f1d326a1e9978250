"""How many pages the KV cache gets."""

import os
from collections.abc import Sequence as Items
from pathlib import Path

import torch

from service.engine.kv_cache import bytes_per_token
from service.errors import ModelNotSupportedError
from service.models.loading import LoadedModel
from service.settings import Settings
from sparse_methods.kernels.operation import LayerGeometry

MIN_PAGES = 4  # what the self-test at load needs: a page for each of its prompts, and one more
_CGROUP = Path("/sys/fs/cgroup")


def num_pages(settings: Settings, geometries: Items[LayerGeometry], loaded: LoadedModel) -> int:
    """Pages that fit into the memory the operator allows, and no more than could ever be used.

    Raises:
        ModelNotSupportedError: Not even MIN_PAGES fit.
    """
    parameter = next(loaded.model.parameters())
    page_bytes = bytes_per_token(geometries, parameter.dtype) * settings.block_size
    free = 0 if settings.kv_cache_bytes is not None else free_memory_bytes(parameter.device)
    context = min(loaded.max_context_tokens, settings.max_context_tokens or 2**62)
    return pages_within(settings, free, page_bytes, context)


def pages_within(settings: Settings, free_bytes: int, page_bytes: int, context_tokens: int) -> int:
    """The same from numbers alone.

    Args:
        settings: What the cache may take, and how many requests run at once.
        free_bytes: Memory that is free once the weights are loaded.
        page_bytes: Keys and values of a page, over all layers.
        context_tokens: Longest prompt plus output.

    Raises:
        ModelNotSupportedError: Not even MIN_PAGES fit.
    """
    budget = settings.kv_cache_bytes
    if budget is None:
        budget = int(free_bytes * settings.kv_cache_memory_fraction)
    pages_per_request = -(-context_tokens // settings.block_size)
    most_used = max(MIN_PAGES, pages_per_request * settings.max_running_requests)
    count = min(budget // page_bytes, most_used)
    if count < MIN_PAGES:
        raise ModelNotSupportedError(
            f"The KV cache may take {budget} bytes, but {MIN_PAGES} pages of"
            f" {settings.block_size} tokens need {MIN_PAGES * page_bytes}. Free memory, or raise"
            " SPARSESERVE_KV_CACHE_BYTES."
        )
    return count


def free_memory_bytes(device: torch.device) -> int:
    """Memory that can still be allocated on the device, within a container's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = _available_bytes()
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):  # no container, or no limit ("max")
        return available
    return min(available, limit - used)


def _available_bytes() -> int:
    """Memory the kernel could hand out without swapping; all free pages where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
