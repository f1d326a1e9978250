"""What a method may look at when it decides, and the form of its decision.

Shape legend: B batch, T packed query rows, N query tiles, R rows of a decode step, M logical pages
or blocks, C capacity of a list, P physical pages, Hq query heads, Hkv key/value heads, G = Hq / Hkv
heads of a group, D head dimension. A *block* is a tile of sparsity, a *page* a unit of KV storage;
the engine makes one page hold exactly one block of keys.
"""

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch.nn import functional


class Phase(StrEnum):
    """Which half of a generation a query row belongs to."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True)
class PageSummaries:
    """Statistics over the keys of each physical page, after RoPE, kept as pages fill.

    Attributes:
        minimum: [P, Hkv, D] per channel, over the keys written so far.
        maximum: [P, Hkv, D] likewise.
        total: [P, Hkv, D] float32, sum of the keys written so far.
    """

    minimum: torch.Tensor
    maximum: torch.Tensor
    total: torch.Tensor


@dataclass(frozen=True)
class PrefillView:
    """The query tiles of one request's prompt that a step computes, in one layer.

    Attributes:
        query: [T, Hq, D] consecutive rows, after RoPE.
        keys: [P, block_size, Hkv, D] pages of the cache, these rows' keys written.
        pages: [M] int64, physical page of each logical block up to the last row's own.
        position: Absolute position of the first row, a multiple of ``block_size``.
        prompt_len: Tokens of the whole prompt, of which later ones may not be computed yet.
        scale: Factor of the scores, usually 1 / sqrt(D).
        block_size: Rows of a full tile and keys of a block, in tokens.
        layer: Index of the attention layer.
        num_layers: Attention layers of the model.
        summaries: Of the same cache, if the method uses them.
    """

    query: torch.Tensor
    keys: torch.Tensor
    pages: torch.Tensor
    position: int
    prompt_len: int
    scale: float
    block_size: int
    layer: int
    num_layers: int
    summaries: PageSummaries | None = None

    @property
    def num_rows(self) -> int:
        """T."""
        return self.query.shape[0]

    @property
    def num_kv_heads(self) -> int:
        """Hkv; the query heads of a group share a list."""
        return self.keys.shape[2]

    @property
    def num_tiles(self) -> int:
        """N; the last one may lack rows."""
        return -(-self.num_rows // self.block_size)

    @property
    def num_blocks(self) -> int:
        """M, the blocks the last tile sees."""
        return self.pages.shape[0]

    @property
    def first_block(self) -> int:
        """Number of the block the first tile lies in; the others follow."""
        return self.position // self.block_size

    @property
    def kv_len(self) -> int:
        """Keys that the last row sees."""
        return self.position + self.num_rows

    @property
    def tile_blocks(self) -> torch.Tensor:
        """[N] int64, number of the block each tile lies in: its diagonal block."""
        stop = self.first_block + self.num_tiles
        return torch.arange(self.first_block, stop, device=self.query.device)

    @property
    def visible(self) -> torch.Tensor:
        """[N, M] bool, blocks of which a tile sees a key."""
        blocks = torch.arange(self.num_blocks, device=self.query.device)
        return blocks <= self.tile_blocks[:, None]

    def query_tiles(self) -> torch.Tensor:
        """[Hkv, G, N, block_size, D] rows by tile; rows that the last one lacks are zero."""
        missing = self.num_tiles * self.block_size - self.num_rows
        rows = functional.pad(self.query, (0, 0, 0, 0, 0, missing))
        grouped = rows.view(self.num_tiles, self.block_size, self.num_kv_heads, -1, rows.shape[-1])
        return grouped.permute(2, 3, 0, 1, 4)

    def gather_keys(self) -> torch.Tensor:
        """[Hkv, kv_len, D] keys of the request so far: a copy."""
        return self.keys[self.pages].flatten(0, 1)[: self.kv_len].transpose(0, 1)

    def block_means(self) -> torch.Tensor:
        """[Hkv, M, D] float32, mean key of each block; needs summaries."""
        if self.summaries is None:
            raise ValueError("the method does not declare that it uses summaries")
        if _has_kernels(self.query):
            from sparse_methods.kernels import triton_means

            return triton_means.block_means(self, self.summaries)
        starts = torch.arange(self.num_blocks, device=self.query.device) * self.block_size
        counts = (self.kv_len - starts).clamp(max=self.block_size)
        totals, num_last = self.summaries.total[self.pages], self.kv_len % self.block_size
        if num_last:  # a request that starts over may have generated keys in this page's summary
            totals[-1:] = self.keys[self.pages[-1:], :num_last].sum(1, dtype=torch.float32)
        return (totals / counts[:, None, None]).transpose(0, 1)

    def tile_means(self) -> torch.Tensor:
        """[Hkv, G, N, D] float32, mean of each tile's rows."""
        if _has_kernels(self.query):
            from sparse_methods.kernels import triton_means

            return triton_means.tile_means(self)
        tiles = torch.arange(self.num_tiles, device=self.query.device)
        counts = (self.num_rows - tiles * self.block_size).clamp(max=self.block_size)
        return self.query_tiles().sum(3, dtype=torch.float32) / counts[:, None]


@dataclass(frozen=True)
class DecodeView:
    """Single query rows of different requests in one layer.

    Nothing here depends on lengths but the tensors' values, so a captured graph stays valid.

    Attributes:
        query: [R, Hq, D], after RoPE.
        keys: [P, page_size, Hkv, D] pages of the cache, these rows' keys written.
        pages: [R, M] int64, physical page of each logical page; entries beyond a row's are 0.
        kv_lens: [R] int32, keys visible to the row, its own included.
        prompt_lens: [R] int32, tokens of the row's prompt.
        scale: Factor of the scores, usually 1 / sqrt(D).
        layer: Index of the attention layer.
        num_layers: Attention layers of the model.
        summaries: Of the same cache, if the method uses them.
        page_scores: [R, Hkv, M] float32 sums of ``score_pages`` over the prompt, if it scores.
    """

    query: torch.Tensor
    keys: torch.Tensor
    pages: torch.Tensor
    kv_lens: torch.Tensor
    prompt_lens: torch.Tensor
    scale: float
    layer: int
    num_layers: int
    summaries: PageSummaries | None = None
    page_scores: torch.Tensor | None = None

    @property
    def num_kv_heads(self) -> int:
        """Hkv; the query heads of a group share a list."""
        return self.keys.shape[2]

    @property
    def page_size(self) -> int:
        """Keys of a page, in tokens."""
        return self.keys.shape[1]

    @property
    def max_pages(self) -> int:
        """M, most pages any row of this view can see."""
        return self.pages.shape[1]

    @property
    def own_pages(self) -> torch.Tensor:
        """[R] int32, logical page of the row's own key."""
        return (self.kv_lens - 1) // self.page_size

    @property
    def visible(self) -> torch.Tensor:
        """[R, M] bool, logical pages of which a row sees a key."""
        pages = torch.arange(self.max_pages, device=self.query.device)
        return pages <= self.own_pages[:, None]

    def query_groups(self) -> torch.Tensor:
        """[R, Hkv, G, D] rows by group."""
        groups: torch.Tensor = self.query.unflatten(1, (self.num_kv_heads, -1))
        return groups


def _has_kernels(tensor: torch.Tensor) -> bool:
    from sparse_methods.kernels import selection  # which knows the views

    return selection.has_kernels(tensor)


@dataclass(frozen=True)
class ThresholdView:
    """What a method may look at when it sets a layer's thresholds while a step runs.

    Attributes:
        phase: Phase of all tiles.
        kv_lens: [N] int64: tokens of the whole prompt (prefill) or visible to the row (decode).
        num_blocks: [N] int64 blocks that each tile sees.
        blocks: [N, 3] int64: total, selected, skipped of each tile in the layers before this one.
        layer: Index of the attention layer.
        num_layers: Attention layers of the model.
    """

    phase: Phase
    kv_lens: torch.Tensor
    num_blocks: torch.Tensor
    blocks: torch.Tensor
    layer: int
    num_layers: int


@dataclass(frozen=True)
class BlockSelection:
    """Blocks of keys each query tile reads, in visiting order.

    Attributes:
        indices: [N, Hkv, C] int32, logical block numbers; entries beyond the count are ignored.
        counts: [N, Hkv] int32, entries in use.
    """

    indices: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def of(cls, is_kept: torch.Tensor) -> "BlockSelection":
        """The selection that a table [Hkv, N, M] bool means, ascending."""
        return cls.in_order(is_kept, None)

    @classmethod
    def in_order(cls, is_kept: torch.Tensor, leading: torch.Tensor | None) -> "BlockSelection":
        """The same, but each tile visits its block of ``leading`` [N] int64, a kept one, first."""
        from sparse_methods.kernels.selection import list_kept  # which knows the views

        return cls(*list_kept(is_kept.transpose(0, 1), leading))


@dataclass(frozen=True)
class PageSelection:
    """Logical pages each decode row reads, in visiting order.

    Attributes:
        indices: [R, Hkv, C] int32, logical page numbers; entries beyond the count are ignored.
        counts: [R, Hkv] int32, entries in use.
    """

    indices: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def of(cls, is_kept: torch.Tensor) -> "PageSelection":
        """The selection that a table [R, Hkv, M] bool means, ascending."""
        from sparse_methods.kernels.selection import list_kept

        return cls(*list_kept(is_kept))
