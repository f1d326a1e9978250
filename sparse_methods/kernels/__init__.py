"""One attention operation, several implementations; this module picks one.

An implementation asked for by name never falls back; ``auto`` takes the best that runs here.
"""

import importlib.util
from collections.abc import Callable, Iterable

import torch

from sparse_methods.errors import UnsupportedError
from sparse_methods.kernels import page_summary, reference
from sparse_methods.kernels.operation import AttentionInputs, AttentionOutputs, LayerGeometry

Implementation = Callable[[AttentionInputs], AttentionOutputs]
CacheWriter = Callable[[page_summary.CacheUpdate], None]

_FLASH_ATTENTION_4_MAJORS = (9, 10)  # compute capabilities: Hopper, Blackwell

IMPLEMENTATIONS = ("reference", "triton", "flash_attention_4")


def pick_implementation(
    name: str = "auto", device: torch.device | str = "cpu"
) -> tuple[str, Implementation]:
    """Return the name and the function of an implementation.

    Raises:
        UnsupportedError: No implementation of this name exists, or its library is missing.
    """
    if name == "auto":
        name = _best(torch.device(device))
    if name not in IMPLEMENTATIONS:
        raise UnsupportedError(
            f"Unknown attention implementation {name!r}. Known: auto, {sorted(IMPLEMENTATIONS)}."
        )
    if name == "reference":
        return name, reference.attend
    if name == "flash_attention_4":
        if not _has_flash_attention_4():
            raise UnsupportedError(
                "Attention implementation 'flash_attention_4' needs the library flash-attn-4:"
                " install the extra 'gpu', or take 'triton'."
            )
        from sparse_methods.kernels import flash_attention_4

        return name, flash_attention_4.attend
    from sparse_methods.kernels import triton_attention

    return name, triton_attention.attend


def prepare(
    name: str,
    geometries: Iterable[LayerGeometry],
    dtype: torch.dtype,
    block_size: int,
    device: torch.device,
) -> None:
    """Compile what an implementation takes long to compile, so that no request waits for it."""
    if name == "reference":
        return
    from sparse_methods.kernels import triton_prefill

    different = dict.fromkeys(geometries)
    for geometry in different:
        triton_prefill.prepare(geometry, dtype, block_size, device)
    if name == "flash_attention_4":
        from sparse_methods.kernels import flash_attention_4

        for geometry in different:
            flash_attention_4.prepare(geometry, dtype, block_size, device)


def pick_cache_writer(name: str) -> CacheWriter:
    """Return what writes keys, values and page summaries for an implementation's device."""
    if name == "reference":
        return page_summary.write_cache
    from sparse_methods.kernels import triton_cache

    return triton_cache.write_cache


def _best(device: torch.device) -> str:
    if device.type != "cuda":
        return "reference"
    is_served = torch.cuda.get_device_capability(device)[0] in _FLASH_ATTENTION_4_MAJORS
    return "flash_attention_4" if is_served and _has_flash_attention_4() else "triton"


def _has_flash_attention_4() -> bool:
    if importlib.util.find_spec("flash_attn") is None:  # its parent first: find_spec imports it
        return False
    return importlib.util.find_spec("flash_attn.cute") is not None
