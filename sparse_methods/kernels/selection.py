"""What rules of selection have in common: eager here, which defines it, and in Triton on a GPU.

Ranks fall from left to right of an order that nobody sorts on a GPU, so ties need a rule: of equal
entries the earlier comes first, in every implementation. Triton loads when a kernel is needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional


def has_kernels(tensor: torch.Tensor) -> bool:
    """Whether selection runs in Triton where this tensor lies."""
    return tensor.is_cuda


def largest(values: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """[..., M] bool, the ``counts`` [..., 1] largest of the values [..., M] float32."""
    if has_kernels(values):
        from sparse_methods.kernels import triton_lists

        return triton_lists.largest(values, counts)
    order = values.argsort(dim=-1, descending=True, stable=True)
    is_within = torch.arange(values.shape[-1], device=values.device) < counts
    is_within = is_within.expand_as(order)
    return torch.zeros_like(is_within).scatter(-1, order, is_within)


def covering(ranks: torch.Tensor, mass: torch.Tensor, share: float) -> torch.Tensor:
    """[..., M] bool, the first entries by falling rank that hold a share of the row's whole mass.

    Args:
        ranks: [..., M] float32.
        mass: [..., M] float32, not negative; an entry is kept if those before it hold less.
        share: From 0 to 1.
    """
    if has_kernels(mass):
        from sparse_methods.kernels import triton_lists

        return triton_lists.covering(ranks, mass, share)
    order = ranks.argsort(dim=-1, descending=True, stable=True)
    reached = mass.gather(-1, order).cumsum(-1)
    before = functional.pad(reached, (1, -1))
    is_needed = before < share * reached[..., -1:]
    return torch.zeros_like(is_needed).scatter(-1, order, is_needed)


def group_shares(
    scores: torch.Tensor, tile_blocks: torch.Tensor, first: int, recent: int
) -> torch.Tensor:
    """Shares of the softmax over the blocks that a tile may choose, added up over a group's heads.

    Args:
        scores: [..., G, N, M] float32.
        tile_blocks: [N] int64, number of the block each tile lies in, the last it sees.
        first: First blocks of the sequence, which are read without a choice.
        recent: Most recent blocks, the tile's own included, likewise.

    Returns:
        [..., N, M] float32; inf for what is read anyway, -1 for what a tile does not see.
    """
    if has_kernels(scores):
        from sparse_methods.kernels import triton_lists

        return triton_lists.group_shares(scores, tile_blocks, first, recent)
    blocks, own = torch.arange(scores.shape[-1], device=scores.device), tile_blocks[:, None]
    is_choice = (blocks >= first) & (blocks <= own - recent)
    scores = scores.masked_fill(~is_choice, float("-inf"))
    highest = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    weights = (scores - highest).exp()
    # Zeros after a running sum leave it as it is to the last bit: chunks decide alike.
    total = weights.cumsum(-1)[..., -1:].clamp(min=1.0)
    shares = (weights / total).sum(-3).masked_fill(~is_choice, -1.0)
    return shares.masked_fill((blocks <= own) & ~is_choice, float("inf"))


@dataclass(frozen=True)
class OwnedLists:
    """One method's lists for all rows of a step, some of which are its own.

    Attributes:
        indices: [N, Hkv, C] int32.
        counts: [N, Hkv] int32.
        members: [N] bool, the rows that it decides for.
    """

    indices: torch.Tensor
    counts: torch.Tensor
    members: torch.Tensor


def merge(parts: Sequence[OwnedLists]) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists as wide as the widest of which each row's are its owner's; nobody owns a row twice.

    Returns:
        [N, Hkv, C] int32 and [N, Hkv] int32; the count of a row without an owner is -1, and
        entries of it or behind a count are arbitrary.
    """
    widest = max(part.indices.shape[2] for part in parts)
    indices = parts[0].indices.new_empty(*parts[0].indices.shape[:2], widest)
    counts = torch.full_like(parts[0].counts, -1, memory_format=torch.contiguous_format)
    if has_kernels(indices):
        from sparse_methods.kernels import triton_lists

        triton_lists.merge_into(indices, counts, parts)
        return indices, counts
    indices.zero_()
    for part in parts:
        indices[part.members, :, : part.indices.shape[2]] = part.indices[part.members]
        counts[part.members] = part.counts[part.members]
    return indices, counts


def list_kept(
    is_kept: torch.Tensor, leading: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists of the columns that a table keeps, ascending.

    Args:
        is_kept: [N, Hkv, M] bool.
        leading: [N] int64, a kept column of each row that comes before the others; None has none.

    Returns:
        [N, Hkv, M] int32, those that are kept before those that are not, and [N, Hkv] int32, how
        many are kept; both contiguous.
    """
    if has_kernels(is_kept):
        from sparse_methods.kernels import triton_lists

        return triton_lists.list_kept(is_kept, leading)
    ranks = (~is_kept).to(torch.int8)
    if leading is not None:
        columns = torch.arange(is_kept.shape[-1], device=is_kept.device)
        ranks = ranks.masked_fill((columns == leading[:, None])[:, None], -1)
    indices = ranks.argsort(dim=-1, stable=True).to(torch.int32)
    return indices.contiguous(), is_kept.sum(-1, dtype=torch.int32).contiguous()
