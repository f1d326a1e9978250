"""Linear layers of one row in Triton: what a sequence that decodes alone spends most of a step on.

A product with one row reads every weight once and reuses none, so only the memory's speed counts. A
program owns a few outputs and reads their weights from end to end; the pass that gates a product
takes place where the product is.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from service.models.kernels.operations import Activation, Projection
from service.models.kernels.triton_activation import activated
from sparse_methods.kernels.triton_launch import as_dependent, await_earlier


@dataclass(frozen=True)
class SingleRowConfig:
    """How the work is cut.

    Attributes:
        outputs: rows of the weight that a program owns, a power of two; of a gated product as many
            gates and as many values.
        channels: of the row, taken at a time, a power of two.
    """

    outputs: int = 8
    channels: int = 1024
    num_warps: int = 4


_DEFAULT = SingleRowConfig()


def is_served(rows: torch.Tensor, projection: Projection) -> bool:
    """Whether these are one row, of the weights' type, and channels lie side by side in both."""
    weight = projection.weight
    return (
        rows.numel() == rows.shape[-1] == weight.shape[1]
        and rows.dtype == weight.dtype
        and rows.is_contiguous()
        and weight.stride(1) == 1
    )


def linear(
    row: torch.Tensor, projection: Projection, config: SingleRowConfig = _DEFAULT
) -> torch.Tensor:
    """The projection of ``row``, one row [..., K]: [..., N].

    Raises:
        ValueError: There are several rows, or channels that do not lie side by side.
    """
    return _launch(row, projection, len(projection.weight), None, config)


def gated_product(
    row: torch.Tensor,
    projection: Projection,
    activation: Activation,
    config: SingleRowConfig = _DEFAULT,
) -> torch.Tensor:
    """See ``ModuleKernels``; for one row [..., K], like ``linear``."""
    return _launch(row, projection, projection.sizes[0], activation, config)


def _launch(
    row: torch.Tensor,
    projection: Projection,
    num_outputs: int,
    activation: Activation | None,
    config: SingleRowConfig,
) -> torch.Tensor:
    weight = projection.weight
    if not is_served(row, projection):
        raise ValueError(f"One contiguous row of {weight.shape[1]} channels, not {row.shape}.")
    output = torch.empty(*row.shape[:-1], num_outputs, dtype=row.dtype, device=row.device)
    _single_row_kernel[(triton.cdiv(num_outputs, config.outputs),)](
        row,
        weight,
        projection.bias,
        output,
        weight.stride(0),
        NUM_OUTPUTS=num_outputs,
        WIDTH=weight.shape[1],
        IS_GATED=activation is not None,
        IS_SILU=activation == "silu",
        OUTPUTS=config.outputs,
        CHANNELS=config.channels,
        num_warps=config.num_warps,
        **as_dependent(row.device),
    )
    return output


@triton.jit
def _single_row_kernel(
    row, weight, bias, output, weight_stride,
    NUM_OUTPUTS: tl.constexpr, WIDTH: tl.constexpr, IS_GATED: tl.constexpr, IS_SILU: tl.constexpr,
    OUTPUTS: tl.constexpr, CHANNELS: tl.constexpr, IS_DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Some outputs; gates lie before the values that they open for, NUM_OUTPUTS rows further on.

    The first weights are on their way before the row is there.
    """
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    mask = outputs < NUM_OUTPUTS
    gates = weight + outputs.to(tl.int64)[:, None] * weight_stride
    values = weight + (NUM_OUTPUTS + outputs).to(tl.int64)[:, None] * weight_stride
    channels = tl.arange(0, CHANNELS)
    gate = _loaded(gates + channels, mask[:, None] & (channels < WIDTH))
    value = gate
    if IS_GATED:
        value = _loaded(values + channels, mask[:, None] & (channels < WIDTH))
    await_earlier(IS_DEPENDENT)
    factors = _factors(row, channels, WIDTH)
    # One sum per channel of a chunk: across threads they are added up once, at the end.
    sums = gate.to(tl.float32) * factors
    value_sums = value.to(tl.float32) * factors
    for start in range(CHANNELS, WIDTH, CHANNELS):
        channels = start + tl.arange(0, CHANNELS)
        is_weight = mask[:, None] & (channels < WIDTH)
        factors = _factors(row, channels, WIDTH)
        sums += _loaded(gates + channels, is_weight).to(tl.float32) * factors
        if IS_GATED:
            value_sums += _loaded(values + channels, is_weight).to(tl.float32) * factors
    result = _biased(tl.sum(sums, 1), bias, outputs, mask)
    if IS_GATED:
        value = _biased(tl.sum(value_sums, 1), bias, NUM_OUTPUTS + outputs, mask)
        result = activated(result, IS_SILU) * value
    tl.store(output + outputs, result.to(output.dtype.element_ty), mask=mask)


@triton.jit
def _loaded(weights, mask):
    """Weights that nobody reads again soon."""
    return tl.load(weights, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _factors(row, channels, WIDTH: tl.constexpr):
    """[1, CHANNELS] of the row that is multiplied."""
    return tl.load(row + channels, mask=channels < WIDTH, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _biased(sums, bias, outputs, mask):
    if bias is not None:
        sums += tl.load(bias + outputs, mask=mask, other=0.0).to(tl.float32)
    return sums
