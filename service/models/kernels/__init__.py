"""What the fused modules of a model compute, for the device it is on."""

import importlib.util
from collections.abc import Sequence
from typing import cast

import torch

from service.models.kernels import eager
from service.models.kernels.operations import ModuleKernels


def pick_module_kernels(
    device: torch.device, max_step_tokens: int | None = None
) -> Sequence[ModuleKernels]:
    """PyTorch on a CPU, Triton on a GPU, and before it quack for gated products where it works.

    The last computes everything; what is before it may fail for some layers. Neither library is
    imported unless it is needed.

    Args:
        device: Where the model is.
        max_step_tokens: Most tokens of a step; None may be any number.
    """
    if device.type != "cuda":
        return [cast("ModuleKernels", eager)]
    from service.models.kernels import triton_modules

    if importlib.util.find_spec("quack") is not None:
        from service.models.kernels import quack_modules

        is_used = max_step_tokens is None or max_step_tokens >= quack_modules.LEAST_ROWS
        if is_used and quack_modules.works_on(device):
            return [cast("ModuleKernels", each) for each in (quack_modules, triton_modules)]
    return [cast("ModuleKernels", triton_modules)]
