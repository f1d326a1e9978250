"""How many sequences a model can serve in a given memory, without that memory and without weights.

The model is built on torch's meta device and discovered as at load, and the pages are those that
the engine would allocate; only what no tensor shows is an assumption: ``RUNTIME_BYTES``.
"""

import re
from dataclasses import dataclass

import torch

from service.engine.kv_cache import bytes_per_token
from service.engine.sizing import pages_within
from service.errors import BadRequestError, ModelNotSupportedError
from service.models.discovery import build_on_meta, discover
from service.models.loading import (
    check_directory,
    default_model_directory,
    read_config,
    resolve_context,
    resolve_dtype,
)
from service.settings import Settings
from sparse_methods.kernels.operation import LayerGeometry

RUNTIME_BYTES = 2**30  # an assumption: CUDA's context, loaded kernels, the allocator's rounding
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B|B)?", re.IGNORECASE)
_FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Plan:
    """What fits, and why no more; bytes and tokens.

    Attributes:
        dtype: Of the weights and the cache.
        cache_bytes: All pages together.
        summary_bytes: What the pages' summaries take beside them.
        context_tokens: Longest sequence planned for.
        num_sequences: Sequences of that length that fit at once.
        is_memory_bound: Whether more memory would let more of them run.
    """

    model: str
    dtype: str
    num_parameters: int
    weight_bytes: int
    num_layers: int
    kv_bytes_per_token: int
    block_size: int
    page_bytes: int
    num_pages: int
    cache_bytes: int
    summary_bytes: int
    context_tokens: int
    pages_per_sequence: int
    num_sequences: int
    is_memory_bound: bool


def make_plan(settings: Settings, memory_bytes: int, context_tokens: int | None = None) -> Plan:
    """Plan the model of ``settings`` for a GPU of ``memory_bytes``.

    Args:
        settings: As they would be served with; ``device`` is ignored. Of the model's directory only
            config.json is read.
        memory_bytes: All memory of the GPU.
        context_tokens: Prompt plus output of a sequence; None takes the longest that is served.

    Raises:
        ModelNotSupportedError: The model cannot be served, or not in so little memory.
    """
    directory = settings.model or default_model_directory()
    check_directory(directory, needs_weights=False)
    config = read_config(directory)
    limit = resolve_context(config, settings.max_context_tokens)
    context = resolve_context(config, context_tokens or limit)
    model = build_on_meta(config)
    geometries = [layer.geometry for layer in discover(model)]
    dtype = resolve_dtype(settings.dtype, torch.device("cuda"))
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    weight_bytes = num_parameters * dtype.itemsize
    free_bytes = memory_bytes - weight_bytes - RUNTIME_BYTES
    if free_bytes <= 0:
        raise ModelNotSupportedError(
            f"The weights take {human_bytes(weight_bytes)} in {dtype}; {human_bytes(memory_bytes)}"
            f" less {human_bytes(RUNTIME_BYTES)} for CUDA do not hold them."
        )
    page_bytes = bytes_per_token(geometries, dtype) * settings.block_size
    num_pages = pages_within(settings, free_bytes, page_bytes, limit)
    pages_per_sequence = -(-context // settings.block_size)
    fitting = num_pages // pages_per_sequence
    return Plan(
        model=directory.name,
        dtype=str(dtype).removeprefix("torch."),
        num_parameters=num_parameters,
        weight_bytes=weight_bytes,
        num_layers=len(geometries),
        kv_bytes_per_token=page_bytes // settings.block_size,
        block_size=settings.block_size,
        page_bytes=page_bytes,
        num_pages=num_pages,
        cache_bytes=num_pages * page_bytes,
        summary_bytes=num_pages * _summary_bytes(geometries, dtype),
        context_tokens=context,
        pages_per_sequence=pages_per_sequence,
        num_sequences=min(fitting, settings.max_running_requests),
        is_memory_bound=fitting < settings.max_running_requests,
    )


def parse_bytes(text: str) -> int:
    """Read a size such as 80GiB, 141GB or 8589934592.

    Raises:
        BadRequestError: It is no size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise BadRequestError(f"{text[:32]!r} is no size; give one such as 80GiB.")
    number, prefix, binary = match.groups()
    power = "KMGT".index(prefix.upper()) + 1 if prefix else 0
    return int(float(number) * (1024 if binary else 1000) ** power)


def human_bytes(count: int) -> str:
    """Bytes in the largest binary unit that leaves at least 1."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.4g} {units[0]}"


def _summary_bytes(geometries: list[LayerGeometry], dtype: torch.dtype) -> int:
    """Bytes of a page's summaries: minimum and maximum in the cache's type, the sum in float32."""
    channels = sum(geometry.num_kv_heads * geometry.head_dim for geometry in geometries)
    return channels * (2 * dtype.itemsize + _FLOAT32_BYTES)
