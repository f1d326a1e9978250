"""One attention operation, several implementations; this module picks one.

An implementation asked for by name never falls back; ``auto`` takes the best that runs here.
"""

from collections.abc import Callable

import torch

from sparse_methods.errors import UnsupportedError
from sparse_methods.kernels import page_summary, reference
from sparse_methods.kernels.operation import AttentionInputs, AttentionOutputs

Implementation = Callable[[AttentionInputs], AttentionOutputs]
CacheWriter = Callable[[page_summary.CacheUpdate], None]

IMPLEMENTATIONS = ("reference", "triton")


def pick_implementation(
    name: str = "auto", device: torch.device | str = "cpu"
) -> tuple[str, Implementation]:
    """Return the name and the function of an implementation.

    Raises:
        UnsupportedError: No implementation of this name exists.
    """
    if name == "auto":
        name = "triton" if torch.device(device).type == "cuda" else "reference"
    if name not in IMPLEMENTATIONS:
        raise UnsupportedError(
            f"Unknown attention implementation {name!r}. Known: auto, {sorted(IMPLEMENTATIONS)}."
        )
    if name == "reference":
        return name, reference.attend
    from sparse_methods.kernels import triton_attention

    return name, triton_attention.attend


def pick_cache_writer(name: str) -> CacheWriter:
    """Return what writes keys, values and page summaries for an implementation's device."""
    if name != "triton":
        return page_summary.write_cache
    from sparse_methods.kernels import triton_cache

    return triton_cache.write_cache
