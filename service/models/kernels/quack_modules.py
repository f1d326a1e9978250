"""Gated products of many rows with the library quack, which gates a product before it is written.

Everything else is as in ``triton_modules``. For a chunk of 8,192 rows of an 8B model, gate and up
take a tenth less time than cuBLAS and a pass that gates do (``benchmarks/products.py``).

Source: Dao-AILab, quack, package ``quack-kernels``, which flash-attn-4 is built upon.
"""

import logging
from functools import cache

import torch

from service.models.kernels import triton_modules
from service.models.kernels.operations import Activation, Projection
from service.models.kernels.triton_modules import add_rms_norm, linear, rms_norm, rotate

__all__ = [
    "LEAST_ROWS",
    "OTHER_ROWS",
    "add_rms_norm",
    "gated_product",
    "linear",
    "rms_norm",
    "rotate",
    "works_on",
]

_MAJORS = (9, 10)  # compute capabilities: Hopper, Blackwell
LEAST_ROWS = 4096  # below them a call costs the host more than the device gains
_NAMES: dict[Activation, str] = {"silu": "swiglu", "gelu_tanh": "geglu"}
OTHER_ROWS = (*triton_modules.OTHER_ROWS, LEAST_ROWS)

logger = logging.getLogger(__name__)


def gated_product(
    rows: torch.Tensor, projection: Projection, activation: Activation
) -> torch.Tensor:
    """See ``ModuleKernels``."""
    if not _serves(rows, projection):
        return triton_modules.gated_product(rows, projection, activation)
    return _gated(rows, projection, activation)


@cache
def works_on(device: torch.device) -> bool:
    """Whether the library computes a small product; it compiles for some seconds.

    Without parts of its compiler it can be imported and fails when it is called.
    """
    if torch.cuda.get_device_capability(device)[0] not in _MAJORS:
        return False
    rows = torch.ones(256, 64, dtype=torch.bfloat16, device=device)
    projection = Projection(rows, None, (128, 128))
    try:
        product = _gated(rows, projection, "silu")
    except Exception as error:  # noqa: BLE001 - whatever a library says of a device
        logger.warning("quack gates no products: %s: %s", type(error).__name__, error)
        return False
    return bool((product == 64 * 64).all())  # the gate of 64 is open


def _serves(rows: torch.Tensor, projection: Projection) -> bool:
    return (
        rows.numel() >= LEAST_ROWS * rows.shape[-1]
        and rows.dtype in (torch.bfloat16, torch.float16)
        and rows.is_contiguous()
        and projection.bias is None
    )


def _gated(rows: torch.Tensor, projection: Projection, activation: Activation) -> torch.Tensor:
    from quack.gemm_interface import gemm_gated

    _, product = gemm_gated(
        rows.flatten(0, -2),
        projection.weight.T,
        activation=_NAMES[activation],
        store_preact=False,
        concat_layout=("B",),  # gates lie before what they open for
        tuned=False,
    )
    gated: torch.Tensor = product.unflatten(0, rows.shape[:-1])
    return gated
