"""What the Triton kernels of one attention call write into."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sparse_methods.kernels.operation import AttentionInputs


@dataclass(frozen=True)
class Workspace:
    """Results of one call; each kernel fills the rows and tiles that it was given.

    The device tensors that describe the tiles themselves are ``QueryTiles.table``,
    ``prefill_indices`` and ``decode_indices``: they serve every layer of a step.

    Attributes:
        output: [T, Hq, Dv].
        lse: [T, Hq] float32, natural log of the softmax's denominator.
        skipped: [N, Hq] int32, blocks that the threshold dropped; written by every program, and
            [0, 0] if no tile has a threshold.
        unread_keys: [N, Hkv] int32, of decode tiles: keys whose values were not read because all
            heads of the group dropped the block; [0, 0] if no tile has a threshold.
    """

    output: torch.Tensor
    lse: torch.Tensor
    skipped: torch.Tensor
    unread_keys: torch.Tensor

    @classmethod
    def allocate(cls, inputs: AttentionInputs) -> "Workspace":
        """Fresh memory for one call; the counters start at zero."""
        query, geometry = inputs.query, inputs.geometry
        num_rows, num_heads = query.shape[:2]
        has_thresholds = inputs.log_thresholds is not None
        num_tiles = len(inputs.tiles.tiles) if has_thresholds else 0
        counters = [num_heads, geometry.num_kv_heads] if has_thresholds else [0, 0]
        skipped, unread_keys = _zeros(query, [(num_tiles, count) for count in counters])
        return cls(
            query.new_empty(num_rows, num_heads, geometry.value_dim),
            query.new_empty(num_rows, num_heads, dtype=torch.float32),
            skipped,
            unread_keys,
        )


def _zeros(like: torch.Tensor, shapes: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    """int32 tensors of zeros that one launch fills.

    Each begins at a multiple of 16 bytes: Triton compiles anew for one that does not.
    """
    sizes = [rows * columns for rows, columns in shapes]
    padded = [-(-size // 4) * 4 for size in sizes]
    parts = like.new_zeros(sum(padded), dtype=torch.int32).split(padded)
    return [part[:size].view(shape) for part, size, shape in zip(parts, sizes, shapes, strict=True)]
