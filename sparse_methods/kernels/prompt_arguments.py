"""Arguments that every kernel for prompt tiles takes, in its order."""

from typing import Any

import torch

from sparse_methods.kernels.operation import AttentionInputs


def places(inputs: AttentionInputs, indices: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Tiles and the order of their programs, pages of requests, and lists if there are any."""
    lists = inputs.lists
    return (
        inputs.tiles.table,
        indices,
        inputs.page_table.pages,
        None if lists is None else lists.indices,
        None if lists is None else lists.counts,
    )


def steps(inputs: AttentionInputs, num_tiles: int, heads_at_once: int) -> tuple[Any, ...]:
    """Strides of ``places``, how many programs share what, and the scale of scores."""
    lists = inputs.lists
    return (
        inputs.page_table.pages.stride(0),
        *((0, 0) if lists is None else lists.indices.stride()[:2]),
        *((0, 0) if lists is None else lists.counts.stride()),
        num_tiles,
        heads_at_once,
        inputs.geometry.scale,
    )
