"""Which of two estimates of a head's attention to blocks is trusted (``flexprefill``), in Triton.

One program decides for a group of heads at one tile. Sums over blocks are exact, so a tile of a
chunk is decided as in the whole prompt, to the last bit.
"""

import torch
import triton
import triton.language as tl

from sparse_methods.kernels.triton_lists import ONE, fixed_total, row_of


def trusted_mass(
    pooled: torch.Tensor, own_means: torch.Tensor, mass: torch.Tensor, first_block: int, tau: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What pooled scores say of a group, by those of its heads where they come near its attention.

    Args:
        pooled: [Hkv, G, N, M] float32 scores of blocks; only those before a tile's own count.
        own_means: [Hkv, G, N] float32 scores of the own block.
        mass: [Hkv, G, N, M] float32 attention to the blocks; 0 behind the own one.
        first_block: Block of the first tile; the others follow.
        tau: Root of the Jensen-Shannon divergence below which pooled scores are trusted, nats.

    Returns:
        [Hkv, N, M] float32, sum of the softmax of pooled scores over the heads that trust them; and
        [Hkv, G, N, 1] bool, which these are.
    """
    num_heads, group, num_tiles, num_blocks = pooled.shape
    sums = torch.empty_like(mass[:, 0], memory_format=torch.contiguous_format)
    is_pooled = torch.empty(num_heads, group, num_tiles, 1, dtype=torch.bool, device=mass.device)
    _trust_kernel[(num_tiles, num_heads)](
        pooled.contiguous(),
        own_means.contiguous(),
        mass.contiguous(),
        sums,
        is_pooled.view(torch.uint8),
        first_block,
        tau,
        GROUP=group,
        **row_of(num_blocks),
    )
    return sums, is_pooled


@triton.jit
def _entropy(p, middle):
    """[n] terms of the divergence of p from middle, 0 where p is."""
    return tl.where(p > 0.0, p * (tl.log(tl.maximum(p, 1e-38)) - tl.log(middle)), 0.0)


@triton.jit(do_not_specialize=["first_block", "num_columns"])
def _trust_kernel(
    pooled, own_means, mass, sums, is_pooled, first_block, tau, num_columns,
    GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tile, kv_head, num_tiles = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    columns = tl.arange(0, BLOCK)
    own = first_block + tile
    is_seen = columns <= own
    total = tl.zeros([BLOCK], tl.float32)
    for head in tl.static_range(GROUP):
        place = (kv_head * GROUP + head) * num_tiles + tile
        at = place * num_columns + columns
        score = tl.load(pooled + at, mask=is_seen, other=float("-inf"))
        score = tl.where(columns == own, tl.load(own_means + place), score)
        weight = tl.exp(score - tl.max(score, 0))
        share = weight / fixed_total(weight)
        attention = tl.load(mass + at, mask=is_seen, other=0.0)
        middle = tl.maximum((share + attention) / 2, 1e-38)
        terms = _entropy(share, middle) + _entropy(attention, middle)
        divergence = tl.sum((terms * ONE).to(tl.int64), 0).to(tl.float32) / ONE / 2
        is_near = tl.sqrt(tl.maximum(divergence, 0.0)) < tau
        tl.store(is_pooled + place, is_near.to(tl.uint8))
        total += tl.where(is_near, share, 0.0)
    at = (kv_head * num_tiles + tile) * num_columns + columns
    tl.store(sums + at, total, mask=columns < num_columns)
