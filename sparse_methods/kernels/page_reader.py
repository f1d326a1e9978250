"""Reading the keys and values of a request from its pages in eager PyTorch."""

from collections.abc import Sequence

import torch

from sparse_methods.kernels.operation import AttentionInputs, Tile, num_side_by_side


class PageReader:
    """Hands out keys and values of one layer: views where pages lie side by side, else copies."""

    def __init__(self, inputs: AttentionInputs) -> None:
        self._table = inputs.page_table
        self._caches = (inputs.keys, inputs.values)
        self._size = inputs.tiles.block_size

    def range(
        self, tile: Tile, listed: list[int] | None, heads: slice, stop: int, start: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[h, n, D] keys and values at positions [start, stop), of the listed blocks if given."""
        size = self._size
        if listed is None:
            logical: Sequence[int] = range(start // size, -(-stop // size))
        else:
            logical = [block for block in listed if block * size < stop]
        if not logical:
            keys, values = self._caches
            return keys.new_empty(1, 0, keys.shape[-1]), values.new_empty(1, 0, values.shape[-1])
        skip = start - logical[0] * size if listed is None else 0
        num_keys = len(logical) * size - max(0, (logical[-1] + 1) * size - stop)
        keys, values = self.blocks(tile.request, logical, heads)
        return keys[:, skip:num_keys], values[:, skip:num_keys]

    def blocks(
        self, request: int, logical: Sequence[int], heads: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[h, n, D] keys and values of whole blocks."""
        keys, values = self._read(request, logical, heads, self._caches)
        return keys, values

    def keys(self, request: int, stop: int) -> torch.Tensor:
        """[Hkv, stop, D] keys of a request up to a position."""
        logical = range(-(-stop // self._size))
        return self._read(request, logical, slice(None), self._caches[:1])[0][:, :stop]

    def _read(
        self,
        request: int,
        logical: Sequence[int],
        heads: slice,
        caches: tuple[torch.Tensor, ...],
    ) -> list[torch.Tensor]:
        row, count = self._table.rows[request], len(logical)
        pages = [row[block] for block in logical]
        if logical == range(count):  # all blocks so far: the common case, found once per step
            is_run = count <= self._table.leading_runs[request]
        else:
            is_run = num_side_by_side(pages) == count
        of_heads = [cache[:, :, heads] for cache in caches]
        if is_run:
            chosen = [cache[pages[0] : pages[0] + count] for cache in of_heads]
        else:  # three times as fast as indexing with a list
            index = torch.tensor(pages, device=caches[0].device)
            chosen = [cache.index_select(0, index) for cache in of_heads]
        return [cache.flatten(0, 1).transpose(0, 1) for cache in chosen]
