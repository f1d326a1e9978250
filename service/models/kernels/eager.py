"""The passes between matrix products in PyTorch, in as few trips through memory as it can do.

Measured alone on one core of a CPU, a norm takes a sixteenth and a norm with RoPE a tenth of the
time of the modules' own passes: a vector norm is one vectorised pass, and weights join the small
tables of angles. Of a whole model that is a few percent, as products are nine tenths of it.
"""

import torch
from torch.nn import functional

from service.models.kernels.operations import Activation, Norm, Projection, RotaryHeads

OTHER_ROWS: tuple[int, ...] = ()


def rms_norm(rows: torch.Tensor, norm: Norm) -> torch.Tensor:
    """See ``ModuleKernels``."""
    wide = rows.float()
    return (wide * _scale(wide, norm)).mul_(_weight(norm)).to(rows.dtype)


def add_rms_norm(
    residual: torch.Tensor, rows: torch.Tensor, norm: Norm
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``ModuleKernels``."""
    total = residual + rows
    return total, rms_norm(total, norm)


def linear(rows: torch.Tensor, projection: Projection) -> torch.Tensor:
    """See ``ModuleKernels``."""
    return functional.linear(rows, projection.weight, projection.bias)


def gated_product(
    rows: torch.Tensor, projection: Projection, activation: Activation
) -> torch.Tensor:
    """See ``ModuleKernels``.

    Two products: what they write is contiguous, and that makes up for the second launch.
    """
    weights = projection.weight.split(projection.sizes)
    biases = (None, None) if projection.bias is None else projection.bias.split(projection.sizes)
    gate, up = (functional.linear(rows, w, b) for w, b in zip(weights, biases, strict=True))
    wide = gate.float()
    if activation == "silu":
        wide = functional.silu(wide, inplace=True)
    else:
        wide = functional.gelu(wide, approximate="tanh")
    return wide.mul_(up).to(rows.dtype)


def rotate(
    rows: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, heads: RotaryHeads
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``ModuleKernels``."""
    num_queries, num_keys, head_dim = heads.num_heads, heads.num_kv_heads, heads.head_dim
    wide = rows[:, : (num_queries + num_keys) * head_dim].float()
    queries, keys = wide.unflatten(1, (-1, head_dim)).split([num_queries, num_keys], 1)
    angles = (cosines[:, : heads.half].float(), sines[:, : heads.half].float())
    return (
        _turned(queries, angles, heads.query_norm).to(rows.dtype),
        _turned(keys, angles, heads.key_norm).to(rows.dtype),
    )


def _turned(
    heads: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor], norm: Norm | None
) -> torch.Tensor:
    """[T, H, D]; the scale of each head comes last, as turning is linear."""
    half, rest = angles[0].shape[1], 2 * angles[0].shape[1]
    cosines, sines = (table[:, None] for table in angles)
    first, second = heads[..., :half], heads[..., half:rest]
    weight = None if norm is None else _weight(norm)
    # Each half meets the angles times its own weights: tables of [T, 1, half], shared by heads.
    first_cosines, first_sines, second_cosines, second_sines = (
        (cosines, sines, cosines, sines)
        if weight is None
        else (
            cosines * weight[:half],
            sines * weight[:half],
            cosines * weight[half:rest],
            sines * weight[half:rest],
        )
    )
    turned = torch.empty(heads.shape, device=heads.device)
    left, right = turned[..., :half], turned[..., half:rest]
    torch.mul(first, first_cosines, out=left).addcmul_(second, second_sines, value=-1)
    torch.mul(second, second_cosines, out=right).addcmul_(first, first_sines)
    if rest < heads.shape[2]:
        turned[..., rest:] = heads[..., rest:] * (1 if weight is None else weight[rest:])
    return turned if norm is None else turned.mul_(_scale(heads, norm))


def _scale(wide: torch.Tensor, norm: Norm) -> torch.Tensor:
    """[..., 1] float32, one over the root mean square of the last dimension."""
    lengths: torch.Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return lengths.square_().mul_(1 / wide.shape[-1]).add_(norm.epsilon).rsqrt_()


def _weight(norm: Norm) -> torch.Tensor:
    weight = norm.weight.float()
    return weight + norm.offset if norm.offset else weight
