"""Kernels that take their places on the device while the one before them still runs.

A step that decodes few sequences is hundreds of short kernels, and between two of them the device
drains and fills. From Hopper on a kernel may be launched as a dependent of the one before: it is
there when that one ends, and has loaded what nobody writes (weights). Before anything else it waits
until all that came before has ended, so the order of what is read and written stays the same.

Kernels that choose blocks are launched as ever: attention that took what places they left was
slower than attention that came after them (docs/lab.md, 2026-11-30).

Source: CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization".
"""

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

HOPPER = 9  # compute capability


def as_dependent(device: torch.device) -> dict[str, bool]:
    """Arguments for the launch of a kernel that calls ``await_earlier``."""
    if not _has_dependents(device):
        return {"IS_DEPENDENT": False}
    return {"IS_DEPENDENT": True, "launch_pdl": True}


def _has_dependents(device: torch.device) -> bool:
    return cuda_major(device) >= HOPPER


@cache
def cuda_major(device: torch.device) -> int:
    """Major compute capability of the NVIDIA device that kernels are compiled for; 0: no such."""
    if device.type != "cuda" or torch.version.cuda is None or triton.knobs.runtime.interpret:
        return 0
    return torch.cuda.get_device_capability(device)[0]


@triton.jit
def await_earlier(IS_DEPENDENT: tl.constexpr):
    """Wait until every kernel before this one has ended, and let the next one take its place.

    Every program comes here before it reads what a kernel wrote, and before it writes anything. In
    the other order several kernels wait at once, and take room from the one that runs.
    """
    if IS_DEPENDENT:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
