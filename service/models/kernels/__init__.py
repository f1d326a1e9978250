"""What the fused modules of a model compute, for the device it is on."""

from typing import cast

import torch

from service.models.kernels import eager
from service.models.kernels.operations import ModuleKernels


def pick_module_kernels(device: torch.device) -> ModuleKernels:
    """Triton on a GPU, PyTorch elsewhere; Triton is not imported unless it is needed."""
    if device.type != "cuda":
        return cast("ModuleKernels", eager)
    from service.models.kernels import triton_modules

    return cast("ModuleKernels", triton_modules)
