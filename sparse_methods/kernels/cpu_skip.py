"""Which blocks a threshold keeps, on a CPU: decided before any weight is computed.

The rule wants each row's largest score in every block, in float32. Where the processor multiplies
bfloat16 several times as fast, rounded scores decide most of it: how far they can be off is known
from what rounding took from each row and key. Rows that come too near to the threshold, a few of a
hundred, are scored again in float32. So every decision is that of float32 scores.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

_STRIPE_KEYS = 2048  # keys scored at once: their scores stay in the cache
_MANY_ROWS = 128  # of a group: from here on, whole vectors of rows are worth it
_ROUNDING = 2.0**-8  # relative, of one rounding to bfloat16
_SLACK = 1.01  # for sums in float32, which are off by far less


class SkipRule:
    """The rule for the query tiles of one request in one layer.

    Args:
        keys: [Hkv, n, D] keys of the request by position.
        block_size: Keys of a block, tokens.
    """

    def __init__(self, keys: torch.Tensor, block_size: int) -> None:
        self._keys = keys
        self._size = block_size

    @functools.cached_property
    def _rounded(self) -> torch.Tensor:
        """[Hkv, n, D] bfloat16 keys."""
        return self._keys.to(torch.bfloat16).contiguous()

    @functools.cached_property
    def _norms(self) -> list[tuple[float, float]]:
        """Of each KV head, the largest norm of a key, and of what rounding took from one."""
        keys = self._keys.float()
        parts = (keys, keys - self._rounded.float())
        norms: list[tuple[float, float]] = torch.stack(
            [part.norm(dim=-1).amax(-1) for part in parts], -1
        ).tolist()
        return norms

    def kept(
        self,
        query: torch.Tensor,
        head: int,
        position: int,
        listed: Sequence[int],
        log_threshold: float,
    ) -> torch.Tensor:
        """Decide for one tile.

        Args:
            query: [G, n, D] float32 rows of the group of a KV head, scaled; all lie in one block.
            head: The KV head.
            position: Of the first row.
            listed: Blocks in visiting order, none after the rows' own.
            log_threshold: Natural log of lambda, below 0.

        Returns:
            [G, m] bool, in visiting order.
        """
        own = position // self._size
        others = [block for block in listed if block != own]
        place = listed.index(own) if len(others) < len(listed) else len(others)
        own_maxima = self._own_maxima(query, head, position)[..., : len(listed) - len(others)]

        def in_order(others: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
            return torch.cat([others[..., :place], own, others[..., place:]], -1)

        # Keys are not worth rounding for few rows, such as a generated one.
        if query.shape[0] * query.shape[1] < _MANY_ROWS or not multiplies_bfloat16():
            maxima = _maxima(query, self._of(self._keys, head, others), self._size)
            return _keeps(in_order(maxima, own_maxima), log_threshold).any(1)
        rounded_query = query.to(torch.bfloat16)
        maxima = _maxima(rounded_query, self._of(self._rounded, head, others), self._size)
        error = self._error(query, rounded_query, head, maxima)
        kept, asks = _decide(in_order(maxima, own_maxima), log_threshold, error)
        members, rows = asks.nonzero(as_tuple=True)
        if members.shape[0]:
            keys = self._of(self._keys, head, others)
            maxima = _maxima(query[members, rows][None], keys, self._size)[0]
            keeps = _keeps(in_order(maxima, own_maxima[members, rows]), log_threshold)
            kept = kept.int().index_add_(0, members, keeps.int()) > 0
        return kept

    def _of(self, keys: torch.Tensor, head: int, blocks: Sequence[int]) -> torch.Tensor:
        """[m * block, D] keys of full blocks, of one head."""
        of_head = keys[head]
        if blocks and all(after == block + 1 for block, after in itertools.pairwise(blocks)):
            return of_head[blocks[0] * self._size : (blocks[-1] + 1) * self._size]
        num_full = of_head.shape[0] // self._size
        by_block = of_head[: num_full * self._size].unflatten(0, (num_full, self._size))
        chosen: torch.Tensor = by_block.index_select(0, torch.tensor(blocks, dtype=torch.int64))
        return chosen.flatten(0, 1)

    def _own_maxima(self, query: torch.Tensor, head: int, position: int) -> torch.Tensor:
        """[G, n, 1] each row's largest score in its own block."""
        start, num_rows = position // self._size * self._size, query.shape[1]
        keys = self._keys[head, start : position + num_rows].float()
        after = torch.ones(num_rows, keys.shape[0], dtype=torch.bool).triu_(position - start + 1)
        scores = (query.flatten(0, 1) @ keys.T).view(*query.shape[:2], -1)
        return scores.masked_fill_(after, float("-inf")).amax(-1, keepdim=True)

    def _error(
        self, query: torch.Tensor, rounded_query: torch.Tensor, head: int, maxima: torch.Tensor
    ) -> torch.Tensor:
        """[G, n, 1] most that a rounded maximum can differ from the exact one.

        |q k - q' k'| <= |q - q'| |k| + |q'| |k - k'|, and the score itself is rounded once more.
        """
        norm, lost = self._norms[head]
        rounded = rounded_query.float()
        of_query = (query - rounded).norm(dim=-1, keepdim=True) * norm
        of_keys = rounded.norm(dim=-1, keepdim=True) * lost
        largest = maxima.abs().amax(-1, keepdim=True) if maxima.shape[-1] else 0.0
        error: torch.Tensor = (of_query + of_keys + largest * _ROUNDING) * _SLACK
        return error


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether products of bfloat16 are faster than those of float32 on this processor."""
    find: Callable[[], dict[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)
    capabilities = find()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _maxima(query: torch.Tensor, keys: torch.Tensor, size: int) -> torch.Tensor:
    """[G, n, m] float32, largest product of each row [G, n, D] in each block of [m * size, D]."""
    rows = query.flatten(0, 1)
    step = max(1, _STRIPE_KEYS // size) * size
    stripes = [
        _block_maxima(rows, keys[start : start + step].to(rows.dtype), size)
        for start in range(0, keys.shape[0], step)
    ]
    if not stripes:
        return query.new_empty(*query.shape[:2], 0, dtype=torch.float32)
    return torch.cat(stripes, 1).float().contiguous().view(*query.shape[:2], -1)


def _block_maxima(rows: torch.Tensor, keys: torch.Tensor, size: int) -> torch.Tensor:
    """[n, m] largest product of each row [n, D] in each block of [m * size, D]."""
    if rows.shape[0] < _MANY_ROWS:
        maxima: torch.Tensor = (rows @ keys.T).unflatten(1, (-1, size)).amax(2)
    else:  # the maximum of many rows runs over whole vectors of them
        maxima = (keys @ rows.T).unflatten(0, (-1, size)).amax(1).T
    return maxima


def _keeps(maxima: torch.Tensor, log_threshold: float) -> torch.Tensor:
    """[..., m] bool, blocks that a row keeps by its maxima [..., m] in visiting order."""
    return maxima - maxima.cummax(-1).values > log_threshold


def _decide(
    maxima: torch.Tensor, log_threshold: float, error: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What maxima [G, n, m] that are off by up to ``error`` [G, n, 1] say.

    Returns:
        [G, m] bool, blocks that are kept in any case; [G, n] bool, rows that decide about others.
    """
    margins = maxima - maxima.cummax(-1).values
    kept = (margins > log_threshold + 2 * error).any(1)
    is_possible = margins > log_threshold - 2 * error
    return kept, (is_possible & ~kept[:, None]).any(-1)
