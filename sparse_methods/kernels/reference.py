"""The attention operation in eager PyTorch: the specification, and the implementation for CPUs.

Blocks that are not listed are never touched; tiles that fall below the threshold skip the
exponential, the load of V and the product with it. Fewer blocks mean less time.

Two ways to the same numbers: *fused* hands whole runs of keys to PyTorch's CPU flash attention
and merges partial results by their log-sum-exp, tiles with a threshold after ``cpu_skip`` has
decided what they keep; *explicit* walks stripes of blocks with an online softmax, which any
geometry and any threshold can use.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional

from sparse_methods.kernels.cpu_flash import causal_squares, flash, merge
from sparse_methods.kernels.cpu_skip import SkipRule
from sparse_methods.kernels.operation import (
    AttentionInputs,
    AttentionOutputs,
    Tile,
    count_selected,
    host_lists,
    visible_blocks,
)
from sparse_methods.kernels.page_reader import PageReader

_WHOLE_GROUP = slice(None)
_STRIPE_KEYS = 1024  # keys of one explicit stripe: scores of a tile then stay in the cache


def attend(inputs: AttentionInputs) -> AttentionOutputs:
    """Compute the operation; see ``operation`` for shapes and meaning."""
    return _Reference(inputs).run()


@dataclass
class _Softmax:
    """Running state of an online softmax over [h, G, n] rows."""

    maximum: torch.Tensor  # [h, G, n]
    denominator: torch.Tensor  # [h, G, n]
    output: torch.Tensor  # [h, G, n, Dv]


class _Reference:
    def __init__(self, inputs: AttentionInputs) -> None:
        self.inputs = inputs
        self.geometry = inputs.geometry
        self.block_size = inputs.tiles.block_size
        self.blocks, self.kv_elements = count_selected(inputs)
        num_rows, num_heads = inputs.query.shape[:2]
        self.output = inputs.query.new_empty(num_rows, num_heads, self.geometry.value_dim)
        self.lse = inputs.query.new_empty(num_rows, num_heads, dtype=torch.float32)
        self.lists = host_lists(inputs)
        self.log_thresholds = (
            None if inputs.log_thresholds is None else inputs.log_thresholds.tolist()
        )
        self.diagonal_first = (
            None if inputs.diagonal_first is None else inputs.diagonal_first.tolist()
        )
        first, last = visible_blocks(inputs.tiles, inputs.geometry)
        self.first_blocks, self.last_blocks = first.tolist(), last.tolist()
        self.reader = PageReader(inputs)
        self.skip_rules: dict[int, SkipRule] = {}
        self.own_squares: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.can_fuse = (
            self.geometry.is_plain
            and self.geometry.head_dim == self.geometry.value_dim
            and inputs.query.device.type == "cpu"
        )

    def run(self) -> AttentionOutputs:
        for first, last in self._runs():
            tile = self.inputs.tiles.tiles[first]
            if not self._is_fused(first):
                attend_tile = self._attend_skipping if self.can_fuse else self._attend_explicit
                attend_tile(first, tile)
            elif self.lists is None or self.lists[first] is None:
                tail = self.inputs.tiles.tiles[last]
                num_rows = tail.first_row + tail.num_rows - tile.first_row
                self._attend_run(tile._replace(num_rows=num_rows))
            else:
                for heads, listed in self._head_lists(first):
                    self._attend_listed(first, sorted(listed or ()), heads)
        return AttentionOutputs(self.output, self.lse, self.blocks, self.kv_elements)

    def _runs(self) -> Iterator[tuple[int, int]]:
        """Indices (first, last) of tiles that can be attended in one go."""
        # Rows of the heads of a group are folded: enough of them for large blocks inside of the
        # fused operator, few enough to waste little of the causal square.
        num_rows = max(256, 1024 // self.geometry.group_size)
        longest = max(1, num_rows // self.block_size)
        tiles, start = self.inputs.tiles.tiles, 0
        for index in range(1, len(tiles) + 1):
            if index == len(tiles) or index - start == longest or not self._continues(index):
                yield start, index - 1
                start = index

    def _continues(self, index: int) -> bool:
        tile, before = self.inputs.tiles.tiles[index], self.inputs.tiles.tiles[index - 1]
        if tile.request != before.request or tile.is_decode != before.is_decode:
            return False
        if self.lists is not None and (self.lists[index] or self.lists[index - 1]) is not None:
            return False
        return self._is_fused(index) and self._is_fused(index - 1)

    def _is_fused(self, index: int) -> bool:
        if not self.can_fuse:
            return False
        # A tile's first block is never skipped, so a tile with one block knows no threshold.
        return self._log_threshold(index) == float("-inf") or self.last_blocks[index] == 0

    def _log_threshold(self, index: int) -> float:
        return float("-inf") if self.log_thresholds is None else self.log_thresholds[index]

    def _all_heads(self) -> slice:
        return slice(0, self.geometry.num_kv_heads)

    def _head_lists(self, index: int) -> list[tuple[slice, list[int] | None]]:
        """KV heads with the blocks they read, ascending; heads with one list come together."""
        listed = None if self.lists is None else self.lists[index]
        if listed is None:
            return [(self._all_heads(), None)]
        if all(blocks == listed[0] for blocks in listed):
            return [(self._all_heads(), listed[0])]
        return [(slice(head, head + 1), blocks) for head, blocks in enumerate(listed)]

    # Fused -----------------------------------------------------------------------------------

    # Keys before a tile's first row need no mask; its own rows are a causal square.

    def _attend_run(self, tile: Tile) -> None:
        """Attend rows that read every key before them."""
        heads = self._all_heads()
        query = self._query(tile, heads)
        if tile.num_rows == 1:
            keys, values = self.reader.range(tile, None, heads, tile.kv_len)
            self._store(tile, heads, *flash(query, keys, values, self.geometry.scale))
            return
        own = self.reader.range(tile, None, heads, tile.kv_len, start=tile.position)
        keys, values = (part[None] for part in own)
        output, lse = causal_squares(query.flatten(0, 1)[None], keys, values, self.geometry.scale)
        parts = [(output[0], lse[0])]
        if tile.position:
            keys, values = self.reader.range(tile, None, heads, tile.position)
            parts.append(flash(query, keys, values, self.geometry.scale))
        self._store(tile, heads, *merge(parts))

    def _attend_skipping(self, index: int, tile: Tile) -> None:
        """Attend a tile with a threshold: decide by scores alone, then read what is kept."""
        for heads, listed in self._head_lists(index):
            blocks = self._visible_in_order(index) if listed is None else listed
            for number in range(heads.start, heads.stop):
                head = slice(number, number + 1)
                query = self._query(tile, head)[0].float() * self.geometry.scale
                kept = self._skip_rule(tile.request).kept(
                    query, number, tile.position, blocks, self._log_threshold(index)
                )
                self._count_skipped(index, tile, blocks, head, kept[None])
                self._attend_kept(index, blocks, head, kept.tolist())

    def _attend_kept(
        self, index: int, blocks: list[int], head: slice, kept: list[list[bool]]
    ) -> None:
        """Attend the query heads of a group over the blocks that each keeps."""
        # Nothing is kept only where scores are not numbers; neither is then what is read.
        lists = [sorted(itertools.compress(blocks, keeps)) or blocks[:1] for keeps in kept]
        if all(listed == lists[0] for listed in lists):
            self._attend_listed(index, lists[0], head)
            return
        for member, listed in enumerate(lists):
            self._attend_listed(index, listed, head, slice(member, member + 1))

    def _skip_rule(self, request: int) -> SkipRule:
        if request not in self.skip_rules:
            tiles = self.inputs.tiles.tiles
            stop = max(tile.kv_len for tile in tiles if tile.request == request)
            self.skip_rules[request] = SkipRule(self.reader.keys(request, stop), self.block_size)
        return self.skip_rules[request]

    def _attend_listed(
        self, index: int, listed: list[int], heads: slice, members: slice = _WHOLE_GROUP
    ) -> None:
        """Attend a tile that reads the blocks listed, ascending, or some heads of its groups."""
        tile = self.inputs.tiles.tiles[index]
        query, own = self._query(tile, heads)[:, members], tile.position // self.block_size
        if tile.num_rows == 1:
            keys, values = self.reader.range(tile, listed, heads, tile.kv_len)
            self._store(tile, heads, *flash(query, keys, values, self.geometry.scale), members)
            return
        parts = []
        if own in listed:
            output, lse = self._own_square(index)
            parts.append((output[heads, members], lse[heads, members]))
        keys, values = self.reader.range(tile, listed, heads, tile.position)
        if keys.shape[1]:
            parts.append(flash(query, keys, values, self.geometry.scale))
        self._store(tile, heads, *merge(parts), members)

    def _own_square(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[Hkv, G, n, Dv] and [Hkv, G, n] of a tile over its own block.

        Computed with the tiles after it that are as high: small squares are slow one by one.
        """
        if index not in self.own_squares:
            tiles, tile = self.inputs.tiles.tiles, self.inputs.tiles.tiles[index]
            size, skip = self.block_size, tile.position % self.block_size
            alike = list(
                itertools.takewhile(
                    lambda other: _is_alike(tile, other) and other.position % size == skip,
                    tiles[index:],
                )
            )
            row = self.inputs.page_table.rows[tile.request]
            pages = [row[other.position // size] for other in alike]
            keys, values = (
                cache[pages, skip : skip + tile.num_rows].transpose(1, 2)
                for cache in (self.inputs.keys, self.inputs.values)
            )
            rows = self.inputs.query[tile.first_row : tile.first_row + len(alike) * tile.num_rows]
            query = rows.unflatten(0, (len(alike), -1)).transpose(1, 2)
            squares = causal_squares(query, keys, values, self.geometry.scale)
            for place, square in enumerate(zip(*squares, strict=True)):
                self.own_squares[index + place] = square
        return self.own_squares[index]

    # Explicit --------------------------------------------------------------------------------

    def _attend_explicit(self, index: int, tile: Tile) -> None:
        head_lists = self._head_lists(index)
        if tile.num_rows > 1:  # groups skip on their own: a tile one of them keeps costs it alone
            head_lists = [
                (slice(head, head + 1), listed)
                for heads, listed in head_lists
                for head in range(heads.start, heads.stop)
            ]
        for heads, listed in head_lists:
            if listed is None:
                listed = self._visible_in_order(index)
            self._attend_stripes(index, tile, listed, heads)

    def _visible_in_order(self, index: int) -> list[int]:
        blocks = list(range(self.first_blocks[index], self.last_blocks[index] + 1))
        if self.diagonal_first is not None and self.diagonal_first[index]:
            blocks.insert(0, blocks.pop())
        return blocks

    def _attend_stripes(self, index: int, tile: Tile, listed: list[int], heads: slice) -> None:
        query = self._query(tile, heads).float() * self.geometry.scale
        state = _Softmax(
            query.new_full(query.shape[:-1], float("-inf")),
            query.new_zeros(query.shape[:-1]),
            query.new_zeros(*query.shape[:-1], self.geometry.value_dim),
        )
        step = max(1, _STRIPE_KEYS // self.block_size)
        for start in range(0, len(listed), step):
            self._visit(index, tile, listed[start : start + step], heads, (query, state))
        denominator, maximum = state.denominator, state.maximum
        if self.inputs.sinks is not None:
            sinks = self.inputs.sinks.float().view(self.geometry.num_kv_heads, -1, 1)[heads]
            maximum = torch.maximum(maximum, sinks)
            rescale = torch.exp(state.maximum - maximum)
            denominator = denominator * rescale + torch.exp(sinks - maximum)
            state.output *= rescale[..., None]
        output = state.output / denominator[..., None]
        self._store(tile, heads, output, maximum + denominator.log())

    def _visit(
        self,
        index: int,
        tile: Tile,
        stripe: list[int],
        heads: slice,
        rows: tuple[torch.Tensor, _Softmax],
    ) -> None:
        """Fold one stripe of blocks into the softmax of the tile's rows."""
        query, state = rows
        keys, values = self._stripe(tile, stripe, heads)
        scores = self._scores(tile, stripe, query, keys)  # [h, G, n, m, block]
        block_maximum = scores.amax(-1)
        running = torch.maximum(block_maximum.cummax(-1).values, state.maximum[..., None])
        log_threshold = self._log_threshold(index)
        if log_threshold > float("-inf"):
            kept = (block_maximum - running > log_threshold).any(2)  # [h, G, m]
            self._count_skipped(index, tile, stripe, heads, kept)
            scores, values = _drop(scores, values, kept)
        maximum = running[..., -1]
        finite = maximum.masked_fill(maximum == float("-inf"), 0.0)  # rows that saw no key yet
        rescale = torch.exp(state.maximum - finite)
        weights = scores.flatten(-2)[..., : values.shape[1]].sub_(finite[..., None]).exp_()
        state.denominator = state.denominator * rescale + weights.sum(-1)
        update = weights.flatten(1, 2) @ values.to(weights.dtype)
        state.output = state.output * rescale[..., None] + update.view_as(state.output)
        state.maximum = maximum

    def _stripe(
        self, tile: Tile, stripe: list[int], heads: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[h, n, D] keys and values of the stripe; slots that nobody wrote are left out or zero."""
        keys, values = self.reader.blocks(tile.request, stripe, heads)
        last = max(stripe)
        num_missing = (last + 1) * self.block_size - tile.kv_len
        if num_missing > 0 and stripe[-1] == last:
            num_keys = keys.shape[1] - num_missing
            keys, values = keys[:, :num_keys], values[:, :num_keys]
        elif num_missing > 0:  # in the middle of the visiting order
            end = (stripe.index(last) + 1) * self.block_size
            keys, values = keys.clone(), values.clone()
            keys[:, end - num_missing : end] = 0
            values[:, end - num_missing : end] = 0
        return keys, values

    def _scores(
        self, tile: Tile, stripe: list[int], query: torch.Tensor, keys: torch.Tensor
    ) -> torch.Tensor:
        scores = query.flatten(1, 2) @ keys.to(query.dtype).transpose(1, 2)
        if self.geometry.softcap:
            scores = self.geometry.softcap * torch.tanh(scores / self.geometry.softcap)
        num_missing = len(stripe) * self.block_size - keys.shape[1]
        scores = functional.pad(scores, (0, num_missing)) if num_missing else scores
        scores = scores.view(*query.shape[:3], len(stripe), self.block_size)
        hidden = self._hidden(tile, stripe)
        return scores if hidden is None else scores.masked_fill_(hidden, float("-inf"))

    def _hidden(self, tile: Tile, stripe: list[int]) -> torch.Tensor | None:
        """[n, m, block] keys a row may not see, or None if every row sees all of them."""
        device = self.inputs.query.device
        rows = torch.arange(tile.position, tile.kv_len, device=device)[:, None, None]
        first = self.geometry.first_visible(rows)
        begin, end = min(stripe) * self.block_size, (max(stripe) + 1) * self.block_size
        if end <= tile.position + 1 and begin >= int(first[-1]):
            return None
        starts = torch.tensor(stripe, device=device)[:, None] * self.block_size
        keys = starts + torch.arange(self.block_size, device=device)
        return (keys > rows) | (keys < first)

    def _count_skipped(
        self, index: int, tile: Tile, stripe: list[int], heads: slice, kept: torch.Tensor
    ) -> None:
        num_skipped = (~kept).sum(-1).flatten()  # [h * G]
        group = self.geometry.group_size
        self.blocks[index, heads.start * group : heads.stop * group, 2] += num_skipped
        if tile.is_decode:
            sizes = [min(self.block_size, tile.kv_len - b * self.block_size) for b in stripe]
            unread = (~kept.any(1) * torch.tensor(sizes, device=kept.device)).sum()
            self.kv_elements[index, 0] -= unread * self.geometry.value_dim

    # Rows ------------------------------------------------------------------------------------

    def _query(self, tile: Tile, heads: slice) -> torch.Tensor:
        """[h, G, n, D] rows of the tile."""
        rows = self.inputs.query[tile.first_row : tile.first_row + tile.num_rows]
        grouped: torch.Tensor = rows.unflatten(1, (self.geometry.num_kv_heads, -1))
        return grouped[:, heads].permute(1, 2, 0, 3)

    def _store(
        self,
        tile: Tile,
        heads: slice,
        output: torch.Tensor,
        lse: torch.Tensor,
        members: slice = _WHOLE_GROUP,
    ) -> None:
        rows = slice(tile.first_row, tile.first_row + tile.num_rows)
        for result, cache in ((output, self.output), (lse, self.lse)):
            grouped = cache[rows].unflatten(1, (self.geometry.num_kv_heads, -1))
            grouped[:, heads, members] = result.movedim(2, 0).to(cache.dtype)


def _is_alike(tile: Tile, other: Tile) -> bool:
    """Whether two query tiles of a batch can be attended over their own blocks together."""
    return other.request == tile.request and other.num_rows == tile.num_rows and not other.is_decode


def _drop(
    scores: torch.Tensor, values: torch.Tensor, kept: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Leave out blocks that no head keeps, and hide the others from heads that skip them.

    Args:
        scores: [h, G, n, m, block].
        values: [h, n, Dv]; the last block may lack keys.
        kept: [h, G, m] bool.
    """
    if bool(kept.all()):
        return scores, values
    used = kept.any(0).any(0).nonzero()[:, 0]
    block = scores.shape[-1]
    scores = scores[:, :, :, used].masked_fill_(~kept[:, :, None, used, None], float("-inf"))
    columns = (used[:, None] * block + torch.arange(block, device=used.device)).flatten()
    return scores, values[:, columns[columns < values.shape[1]]]
