"""The one attention operation of the service: what goes in, what comes out.

Packed query rows of many requests, cut into query tiles, attend to paged keys and values. A tile
reads every visible block, or those of its lists; a threshold may drop tiles inside the softmax.
Every implementation in this folder computes this and nothing else; ``reference`` defines it.
"""

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class LayerGeometry:
    """What distinguishes one attention layer from another.

    Attributes:
        window: Keys a row sees, its own included; 0 is all of them.
        chunk: Rows see keys of their own chunk of this many positions only; 0 is off.
        softcap: Scores become softcap * tanh(scores / softcap); 0 is off.
        has_sinks: Whether a learned logit per head joins the softmax's denominator.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    softcap: float = 0.0
    window: int = 0
    chunk: int = 0
    has_sinks: bool = False

    @property
    def group_size(self) -> int:
        """Query heads that share a KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def is_plain(self) -> bool:
        """Whether this is causal softmax attention without any extra."""
        return not (self.softcap or self.window or self.chunk or self.has_sinks)

    def first_visible(self, positions: torch.Tensor) -> torch.Tensor:
        """Earliest key each absolute position may see."""
        first = torch.zeros_like(positions)
        if self.window:
            first = torch.maximum(first, positions - self.window + 1)
        if self.chunk:
            first = torch.maximum(first, positions // self.chunk * self.chunk)
        return first


class Tile(NamedTuple):
    """A query tile on the host: rows [first_row, first_row + num_rows) of the packed batch."""

    first_row: int
    num_rows: int
    position: int
    request: int
    is_decode: bool

    @property
    def kv_len(self) -> int:
        """Keys its last row sees under causality."""
        return self.position + self.num_rows


class TileRun(NamedTuple):
    """Prompt tiles of one request, side by side, of which the first begins a block."""

    first_tile: int
    num_tiles: int
    first_row: int
    num_rows: int
    position: int
    request: int

    @property
    def tiles(self) -> slice:
        """Their places in the batch's tiles."""
        return slice(self.first_tile, self.first_tile + self.num_tiles)

    @property
    def rows(self) -> slice:
        """Their rows in the packed batch."""
        return slice(self.first_row, self.first_row + self.num_rows)

    @property
    def kv_len(self) -> int:
        """Keys the last row sees under causality."""
        return self.position + self.num_rows


@dataclass(frozen=True)
class QueryTiles:
    """The query tiles of a batch, cut at absolute multiples of the block size.

    A row that was generated (and not part of the prompt) is a tile of its own, also when it is
    recomputed; so neither chunking nor preemption moves a tile.
    """

    tiles: tuple[Tile, ...]
    block_size: int
    device: torch.device

    @cached_property
    def positions(self) -> torch.Tensor:
        """[N] int64, absolute position of each tile's first row."""
        return self._column([tile.position for tile in self.tiles])

    @cached_property
    def kv_lens(self) -> torch.Tensor:
        """[N] int64, keys each tile's last row sees under causality."""
        return self._column([tile.kv_len for tile in self.tiles])

    @cached_property
    def is_decode(self) -> torch.Tensor:
        """[N] bool."""
        return self._column([tile.is_decode for tile in self.tiles])

    @cached_property
    def max_kv_len(self) -> int:
        """Most keys that a tile's last row sees under causality."""
        return max(tile.kv_len for tile in self.tiles)

    @cached_property
    def runs(self) -> tuple[TileRun, ...]:
        """Prompt tiles of each request; without those that begin within of a block."""
        runs: list[TileRun] = []
        for index, tile in enumerate(self.tiles):
            before = runs[-1] if runs else None
            if tile.is_decode:
                continue
            if before and before.request == tile.request and before.kv_len == tile.position:
                runs[-1] = before._replace(
                    num_tiles=before.num_tiles + 1, num_rows=before.num_rows + tile.num_rows
                )
            elif tile.position % self.block_size == 0:
                runs.append(TileRun(index, 1, *tile[:4]))
        return tuple(runs)

    @cached_property
    def counts_without_lists(self) -> dict[LayerGeometry, tuple[torch.Tensor, torch.Tensor]]:
        """What ``count_selected`` found, by geometry, for tiles that have no lists."""
        return {}

    @property
    def table(self) -> torch.Tensor:
        """[N, 4] int32: first row, number of rows, position and request of each tile."""
        return self._packed[0]

    @property
    def prefill_indices(self) -> torch.Tensor:
        """[n] int32, the tiles that are not decode rows, those with the most keys first."""
        return self._packed[1]

    @property
    def decode_indices(self) -> torch.Tensor:
        """[n] int32, the tiles that are decode rows."""
        return self._packed[2]

    @property
    def tail_indices(self) -> torch.Tensor:
        """[n] int32, last tiles of requests with prompt tiles, of those that end within a block."""
        return self._packed[3]

    def prefill_indices_beside(self, runs: tuple[TileRun, ...]) -> torch.Tensor:
        """``prefill_indices`` without the tiles of ``runs``."""
        if not runs:
            return self.prefill_indices
        if runs not in self._indices_beside:  # the same in every layer of a kind
            taken = {index for run in runs for index in range(run.tiles.start, run.tiles.stop)}
            left = [index for index in self._prefill_order if index not in taken]
            self._indices_beside[runs] = self._column(left, torch.int32)
        return self._indices_beside[runs]

    @cached_property
    def _indices_beside(self) -> dict[tuple[TileRun, ...], torch.Tensor]:
        return {}

    @cached_property
    def _prefill_order(self) -> list[int]:
        """Numbers of the prompt tiles, those with the most keys first."""
        prefill = [index for index, tile in enumerate(self.tiles) if not tile.is_decode]
        return sorted(prefill, key=lambda index: -self.tiles[index].kv_len)

    @cached_property
    def _packed(self) -> tuple[torch.Tensor, ...]:
        """What kernels read of the tiles, moved to the device in one copy."""
        tiles, prefill = self.tiles, self._prefill_order
        decode = [index for index, tile in enumerate(tiles) if tile.is_decode]
        begun = {tiles[index].request for index in prefill}
        # A decode row, where a request starts over: behind its prompt, generated keys follow.
        last = {tile.request: index for index, tile in enumerate(tiles) if tile.request in begun}
        tails = [index for index in last.values() if tiles[index].kv_len % self.block_size]
        parts = [[value for tile in tiles for value in tile[:4]], prefill, decode, tails]
        # Triton compiles a kernel anew for a pointer that is no multiple of 16 bytes.
        padded = [part + [0] * (-len(part) % 4) for part in parts]
        values = self._column(list(itertools.chain(*padded)), torch.int32)
        table, *indices = (
            rows[: len(part)]
            for rows, part in zip(values.split(list(map(len, padded))), parts, strict=True)
        )
        return table.view(-1, 4), *indices

    @classmethod
    def of_rows(
        cls, tiles: tuple[Tile, ...], block_size: int, positions: torch.Tensor
    ) -> "QueryTiles":
        """Decode rows, row i of request i, whose positions [N] int64 the device alone knows.

        Then only the number of ``tiles`` and their longest ``kv_len`` hold: a captured graph runs
        with other positions, up to that length.
        """
        built = cls(tiles, block_size, positions.device)
        rows = torch.arange(len(tiles), dtype=torch.int32, device=positions.device)
        columns = [rows, torch.ones_like(rows), positions.to(torch.int32), rows]
        vars(built).update(
            positions=positions,
            kv_lens=positions + 1,
            is_decode=torch.ones_like(positions, dtype=torch.bool),
            _packed=(torch.stack(columns, 1), rows[:0], rows, rows[:0]),
        )
        return built

    def _column(self, values: list[int], dtype: torch.dtype | None = None) -> torch.Tensor:
        column = torch.tensor(values, dtype=dtype)
        if self.device.type == "cuda":  # else the copy would wait for all work asked for before it
            column = column.pin_memory()
        return column.to(self.device, non_blocking=True)


@dataclass(frozen=True)
class PageTable:
    """Where the pages of each request lie.

    Attributes:
        pages: [R, max_pages] int64, physical page of each logical page; unused entries are 0.
    """

    pages: torch.Tensor

    @cached_property
    def compact(self) -> torch.Tensor:
        """The table as int32."""
        return self.pages.to(torch.int32)

    @cached_property
    def rows(self) -> list[list[int]]:
        """The table on the host."""
        rows: list[list[int]] = self.pages.tolist()
        return rows

    @cached_property
    def leading_runs(self) -> list[int]:
        """Of each request, how many of its first pages lie side by side."""
        return [num_side_by_side(row) for row in self.rows]


def num_side_by_side(pages: list[int]) -> int:
    """Length of the longest prefix of ``pages`` that ascends by one."""
    first = pages[0]
    offsets = enumerate(pages)
    return next((count for count, page in offsets if page != first + count), len(pages))


@dataclass(frozen=True)
class BlockLists:
    """Optional lists of logical blocks per tile and KV head.

    Attributes:
        indices: [N, Hkv, C] int32, in visiting order.
        counts: [N, Hkv] int32 entries in use; -1, for all heads of a tile, reads every visible
            block.
    """

    indices: torch.Tensor
    counts: torch.Tensor


@dataclass(frozen=True)
class AttentionInputs:
    """Everything one layer's attention needs.

    Attributes:
        query: [T, Hq, D] packed rows, after RoPE.
        keys: [P, block_size, Hkv, D] pages of the cache, this step's rows already written.
        values: [P, block_size, Hkv, Dv].
        page_table: Pages of the R requests.
        lists: None reads every visible block of every tile.
        log_thresholds: [N] float32, natural log of lambda, -inf is off; None is off everywhere.
        diagonal_first: [N] bool, tiles that visit their last visible block, then the first, then
            the rest in order, unless they have a list; None lets all visit in ascending order.
        sinks: [Hq] learned logits, if the geometry has them.
    """

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    page_table: PageTable
    tiles: QueryTiles
    geometry: LayerGeometry
    lists: BlockLists | None = None
    log_thresholds: torch.Tensor | None = None
    diagonal_first: torch.Tensor | None = None
    sinks: torch.Tensor | None = None


@dataclass(frozen=True)
class AttentionOutputs:
    """What the operation returns.

    Attributes:
        output: [T, Hq, Dv].
        lse: [T, Hq] float32, natural log of the softmax's denominator.
        blocks: [N, Hq, 3] int64, blocks total, selected, skipped (``statistics`` defines them).
        kv_elements: [N, 2] int64, elements of keys and values read, and read by dense attention.
    """

    output: torch.Tensor
    lse: torch.Tensor
    blocks: torch.Tensor
    kv_elements: torch.Tensor


def visible_blocks(tiles: QueryTiles, geometry: LayerGeometry) -> tuple[torch.Tensor, torch.Tensor]:
    """First and last block, [N] each, of which any row of the tile sees a key."""
    first = geometry.first_visible(tiles.positions) // tiles.block_size
    return first, (tiles.kv_lens - 1) // tiles.block_size


def listed_and_visible(inputs: AttentionInputs) -> torch.Tensor:
    """[N, Hkv, C] bool: which entries of the lists are in use and visible to the tile."""
    assert inputs.lists is not None
    indices, counts = inputs.lists.indices, inputs.lists.counts
    first, last = visible_blocks(inputs.tiles, inputs.geometry)
    in_use = torch.arange(indices.shape[2], device=indices.device) < counts[..., None]
    return in_use & (indices >= first[:, None, None]) & (indices <= last[:, None, None])


def host_lists(inputs: AttentionInputs) -> list[list[list[int]] | None] | None:
    """Per tile, the visible listed blocks of each KV head in visiting order; None reads all."""
    if inputs.lists is None:
        return None
    listed = listed_and_visible(inputs)
    if bool(((inputs.lists.counts >= 0) & ~listed.any(-1)).any()):
        raise ValueError("a tile reads no block: every list must name a visible one")
    usable = listed.tolist()
    rows = zip(inputs.lists.indices.tolist(), inputs.lists.counts.tolist(), usable, strict=True)
    return [
        None
        if counts[0] < 0
        else [
            list(itertools.compress(blocks, keep))
            for blocks, keep in zip(indices, keeps, strict=True)
        ]
        for indices, counts, keeps in rows
    ]


def count_selected(inputs: AttentionInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Counters before any threshold: ``blocks`` and ``kv_elements`` of ``AttentionOutputs``."""
    tiles, geometry = inputs.tiles, inputs.geometry
    if inputs.lists is not None:
        return _count(tiles, geometry, inputs.lists, listed_and_visible(inputs))
    cached = tiles.counts_without_lists
    if geometry not in cached:  # the same in every layer of a kind
        cached[geometry] = _count(tiles, geometry, None, None)
    blocks, kv_elements = cached[geometry]
    if inputs.log_thresholds is None:
        return blocks, kv_elements
    return blocks.clone(), kv_elements.clone()  # what the threshold drops comes on top


def _count(
    tiles: QueryTiles,
    geometry: LayerGeometry,
    lists: BlockLists | None,
    listed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    first, last = visible_blocks(tiles, geometry)
    total = (last - first + 1)[:, None].expand(-1, geometry.num_kv_heads)  # [N, Hkv]
    selected, reads_last = total, torch.ones_like(total, dtype=torch.bool)
    if lists is not None and listed is not None:
        is_listed = lists.counts >= 0
        selected = torch.where(is_listed, listed.sum(-1), total)
        is_last = listed & (lists.indices == last[:, None, None])
        reads_last = ~is_listed | is_last.any(-1)
    missing = tiles.block_size - 1 - (tiles.kv_lens - 1) % tiles.block_size  # keys the last lacks
    per_key = geometry.head_dim + geometry.value_dim
    read = (selected * tiles.block_size - reads_last * missing[:, None]).sum(1)
    dense = (total * tiles.block_size - missing[:, None]).sum(1)
    per_head = torch.stack([total, selected, torch.zeros_like(total)], -1)
    blocks = per_head.repeat_interleave(geometry.group_size, 1)
    kv_elements = torch.stack([read, dense], -1) * per_key * tiles.is_decode[:, None]
    return blocks, kv_elements
