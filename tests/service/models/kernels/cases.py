"""Inputs of odd sizes, and what the passes must make of them, in float64."""

import torch

from service.models.kernels.operations import Norm, RotaryHeads


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def norm_of(width, offset=0.0, seed=5, epsilon=1e-2):
    """A norm whose weights and epsilon matter."""
    return Norm(draw(width, seed=seed), epsilon, offset)


def written_out(rows, norm):
    wide = rows.double()
    scaled = wide / (wide.pow(2).mean(-1, keepdim=True) + norm.epsilon).sqrt()
    return scaled * (norm.weight.double() + norm.offset)


HEADS = [
    RotaryHeads(2, 1, 16, 8),
    RotaryHeads(9, 3, 12, 6),  # no power of two, and more heads than a program turns
    RotaryHeads(3, 2, 10, 3),  # channels that are not turned
    RotaryHeads(6, 2, 16, 8, norm_of(16, seed=6), norm_of(16, seed=7, epsilon=0.5)),
    RotaryHeads(7, 5, 14, 5, norm_of(14, 1.0, seed=6), norm_of(14, 0.0, seed=7)),
]


def rotary_case(heads, num_rows):
    """Rows with values behind the keys, angles of both halves, and the turned heads."""
    num_heads, dim, half = heads.num_heads + heads.num_kv_heads, heads.head_dim, heads.half
    rows = draw(num_rows, (num_heads + heads.num_kv_heads) * dim + 3)[:, :-3]
    angles = draw(num_rows, half, seed=1).repeat(1, 2)
    expected = rows[:, : num_heads * dim].double().unflatten(1, (num_heads, dim)).clone()
    if heads.query_norm is not None and heads.key_norm is not None:
        queries, keys = expected[:, : heads.num_heads], expected[:, heads.num_heads :]
        normed = [written_out(queries, heads.query_norm), written_out(keys, heads.key_norm)]
        expected = torch.cat(normed, 1)
    turning = torch.view_as_complex(
        torch.stack([expected[..., :half], expected[..., half : 2 * half]], -1)
    )
    turned = turning * torch.exp(1j * angles[:, None, :half].double())
    expected[..., :half], expected[..., half : 2 * half] = turned.real, turned.imag
    return (
        rows,
        angles.cos(),
        angles.sin(),
        expected.split([heads.num_heads, heads.num_kv_heads], 1),
    )
