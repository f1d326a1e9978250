"""The passes between matrix products in Triton: one launch each, and each value moves once."""

import torch
import triton
import triton.language as tl
from torch.nn import functional

from service.models.kernels import triton_single_row
from service.models.kernels.operations import Activation, Norm, Projection, RotaryHeads
from service.models.kernels.triton_activation import activated
from sparse_methods.kernels.triton_launch import as_dependent, await_earlier

OTHER_ROWS = (1,)

_CHANNELS = 1024  # channels of a gated product that a program computes
_HEADS = 8  # heads of a row that a program turns


def rms_norm(rows: torch.Tensor, norm: Norm) -> torch.Tensor:
    """See ``ModuleKernels``."""
    normed = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    _normalise(rows, None, norm, None, normed)
    return normed


def add_rms_norm(
    residual: torch.Tensor, rows: torch.Tensor, norm: Norm
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``ModuleKernels``."""
    total = torch.empty(rows.shape, dtype=residual.dtype, device=rows.device)
    normed = torch.empty_like(total)
    _normalise(rows, residual, norm, total, normed)
    return total, normed


def linear(rows: torch.Tensor, projection: Projection) -> torch.Tensor:
    """See ``ModuleKernels``."""
    if triton_single_row.is_served(rows, projection):
        return triton_single_row.linear(rows, projection)
    return functional.linear(rows, projection.weight, projection.bias)


def gated_product(
    rows: torch.Tensor, projection: Projection, activation: Activation
) -> torch.Tensor:
    """See ``ModuleKernels``."""
    if triton_single_row.is_served(rows, projection):
        return triton_single_row.gated_product(rows, projection, activation)
    both = functional.linear(rows, projection.weight, projection.bias)
    return gate(both, projection.sizes[0], activation)


def gate(both: torch.Tensor, width: int, activation: Activation) -> torch.Tensor:
    """activation(gate) * up, [..., width], of rows [..., 2 * width] that hold one and the other."""
    product = torch.empty(*both.shape[:-1], width, dtype=both.dtype, device=both.device)
    num_rows = product.numel() // width
    _gate_kernel[(num_rows, triton.cdiv(width, _CHANNELS))](
        both,
        product,
        IS_SILU=activation == "silu",
        WIDTH=width,
        CHANNELS=_CHANNELS,
        num_warps=4,
        **as_dependent(both.device),
    )
    return product


def rotate(
    rows: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, heads: RotaryHeads
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``ModuleKernels``."""
    num_rows, num_heads = rows.shape[0], heads.num_heads + heads.num_kv_heads
    turned = torch.empty(num_rows, num_heads, heads.head_dim, dtype=rows.dtype, device=rows.device)
    query_norm, key_norm = heads.query_norm, heads.key_norm
    rest = heads.head_dim - 2 * heads.half
    _rotate_kernel[(num_rows, triton.cdiv(num_heads, _HEADS))](
        rows,
        cosines,
        sines,
        turned,
        None if query_norm is None else query_norm.weight,
        None if key_norm is None else key_norm.weight,
        rows.stride(0),
        cosines.stride(0),
        sines.stride(0),
        0.0 if query_norm is None else query_norm.epsilon,
        0.0 if key_norm is None else key_norm.epsilon,
        QUERY_OFFSET=0.0 if query_norm is None else query_norm.offset,
        KEY_OFFSET=0.0 if key_norm is None else key_norm.offset,
        NUM_QUERIES=heads.num_heads,
        NUM_HEADS=num_heads,
        HEAD_DIM=heads.head_dim,
        HALF=heads.half,
        PADDED_HALF=triton.next_power_of_2(heads.half),
        REST=rest,
        PADDED_REST=triton.next_power_of_2(max(1, rest)),
        HEADS=_HEADS,
        num_warps=4,
        **as_dependent(rows.device),
    )
    return turned[:, : heads.num_heads], turned[:, heads.num_heads :]


def _normalise(
    rows: torch.Tensor,
    residual: torch.Tensor | None,
    norm: Norm,
    total: torch.Tensor | None,
    normed: torch.Tensor,
) -> None:
    """Launch the kernel that adds, if there is what to add, and normalises."""
    width = rows.shape[-1]
    rows = rows.reshape(-1, width)
    residual = None if residual is None else residual.reshape(-1, width)
    block = triton.next_power_of_2(width)
    _norm_kernel[(rows.shape[0],)](
        rows,
        residual,
        norm.weight,
        total,
        normed,
        rows.stride(0),
        0 if residual is None else residual.stride(0),
        norm.epsilon,
        OFFSET=norm.offset,
        WIDTH=width,
        BLOCK=block,
        num_warps=max(1, min(16, block // 512)),
        **as_dependent(rows.device),
    )


@triton.jit
def _norm_kernel(
    rows, residual, weight, total, normed, row_stride, residual_stride, epsilon,
    OFFSET: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One row: the sum is rounded as it is stored, and then normalised."""
    await_earlier(IS_DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, BLOCK)
    mask = channels < WIDTH
    values = tl.load(rows + row * row_stride + channels, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        earlier = tl.load(residual + row * residual_stride + channels, mask=mask, other=0.0)
        stored = (values + earlier.to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + row * WIDTH + channels, stored, mask=mask)
        values = stored.to(tl.float32)
    scale = tl.math.rsqrt(tl.sum(values * values, 0) / WIDTH + epsilon)
    factors = tl.load(weight + channels, mask=mask, other=0.0).to(tl.float32) + OFFSET
    result = values * scale * factors
    tl.store(normed + row * WIDTH + channels, result.to(normed.dtype.element_ty), mask=mask)


@triton.jit
def _gate_kernel(
    both, product, IS_SILU: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Some channels of one row; the gate lies before the values it opens for."""
    await_earlier(IS_DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mask = channels < WIDTH
    source = both + row * 2 * WIDTH + channels
    gate = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(source + WIDTH, mask=mask, other=0.0).to(tl.float32)
    result = activated(gate, IS_SILU) * up
    tl.store(product + row * WIDTH + channels, result.to(product.dtype.element_ty), mask=mask)


@triton.jit
def _head_factors(
    query_weight, key_weight, channels, COUNT: tl.constexpr, is_query,
    QUERY_OFFSET: tl.constexpr, KEY_OFFSET: tl.constexpr,
):  # fmt: skip
    """[heads, channels]: what a norm multiplies the channels of query heads and key heads with."""
    mask = channels < COUNT
    queries = tl.load(query_weight + channels, mask=mask, other=0.0).to(tl.float32) + QUERY_OFFSET
    keys = tl.load(key_weight + channels, mask=mask, other=0.0).to(tl.float32) + KEY_OFFSET
    return tl.where(is_query, queries[None, :], keys[None, :])


@triton.jit
def _rotate_kernel(
    rows, cosines, sines, turned, query_weight, key_weight,
    row_stride, cosine_stride, sine_stride, query_epsilon, key_epsilon,
    QUERY_OFFSET: tl.constexpr, KEY_OFFSET: tl.constexpr, NUM_QUERIES: tl.constexpr,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr, REST: tl.constexpr, PADDED_REST: tl.constexpr, HEADS: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Some heads of one row: each half of their turned channels, and the rest."""
    await_earlier(IS_DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    is_query = (heads < NUM_QUERIES)[:, None]
    channels = tl.arange(0, PADDED_HALF)
    mask = (heads < NUM_HEADS)[:, None] & (channels < HALF)
    source = rows + row * row_stride + heads[:, None] * HEAD_DIM
    first = tl.load(source + channels, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + HALF + channels, mask=mask, other=0.0).to(tl.float32)
    others = tl.arange(0, PADDED_REST)
    rest_mask = (heads < NUM_HEADS)[:, None] & (others < REST)
    if REST > 0:
        rest = tl.load(source + 2 * HALF + others, mask=rest_mask, other=0.0).to(tl.float32)
    if query_weight is not None:
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        if REST > 0:
            squares += tl.sum(rest * rest, 1)
        epsilon = tl.where(heads < NUM_QUERIES, query_epsilon, key_epsilon)
        scale = tl.math.rsqrt(squares / HEAD_DIM + epsilon)[:, None]
        first *= scale * _head_factors(
            query_weight, key_weight, channels, HALF, is_query, QUERY_OFFSET, KEY_OFFSET
        )
        second *= scale * _head_factors(
            query_weight + HALF, key_weight + HALF, channels, HALF,
            is_query, QUERY_OFFSET, KEY_OFFSET,
        )  # fmt: skip
        if REST > 0:
            rest *= scale * _head_factors(
                query_weight + 2 * HALF, key_weight + 2 * HALF, others, REST,
                is_query, QUERY_OFFSET, KEY_OFFSET,
            )  # fmt: skip
    cosine = tl.load(cosines + row * cosine_stride + channels, mask=channels < HALF, other=0.0)
    sine = tl.load(sines + row * sine_stride + channels, mask=channels < HALF, other=0.0)
    cosine, sine = cosine.to(tl.float32)[None, :], sine.to(tl.float32)[None, :]
    target = turned + (row * NUM_HEADS + heads[:, None]) * HEAD_DIM
    dtype = turned.dtype.element_ty
    tl.store(target + channels, (first * cosine - second * sine).to(dtype), mask=mask)
    tl.store(target + HALF + channels, (second * cosine + first * sine).to(dtype), mask=mask)
    if REST > 0:
        tl.store(target + 2 * HALF + others, rest.to(dtype), mask=rest_mask)
