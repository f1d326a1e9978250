"""Shares of attention that methods estimate blocks by, in Triton.

They come in two launches. The first holds some rows and some blocks, and writes sums of
exp(score - the highest score it saw); the second brings them to one scale, normalises and adds up.
Scores therefore never lie in memory. Blocks are cut at fixed numbers and sums that run over all
blocks are exact, so a tile of a chunk is estimated as in the whole prompt, to the last bit.
"""

import torch
import triton
import triton.language as tl

from sparse_methods.kernels.triton_lists import fixed_total, row_of
from sparse_methods.kernels.triton_means import row_major
from sparse_methods.views import PrefillView

_MEANS = 64  # most blocks whose mean keys a program scores at once
_MEAN_VALUES = 64 * 128  # of these means
_CELLS = 128  # cells of an antidiagonal estimate, along either side
_CELL_BYTES = 1 << 15  # of the rows that a program holds of either side at a time
_TILE_BYTES = 1 << 16  # of a tile's rows that a program holds
_MAX_HELD = 1 << 26  # values between two launches: 256 MiB


def can_share_by_mean_keys(view: PrefillView) -> bool:
    """Whether a program can hold the rows of a tile."""
    row_bytes = triton.next_power_of_2(view.query.shape[2]) * view.query.element_size()
    size: int = triton.next_power_of_2(view.block_size) * row_bytes
    return size <= _TILE_BYTES


def mean_key_shares(view: PrefillView, means: torch.Tensor) -> torch.Tensor:
    """[Hkv, N, M] float32 sums over a group of each head's shares of blocks, by their mean keys.

    A head's share of a block is that of exp(query . mean key), summed over the tile's rows, among
    the blocks the tile sees. ``means`` is [Hkv, M, D] float32.
    """
    query = row_major(view.query)
    num_heads, head_dim = query.shape[1:]
    group = num_heads // view.num_kv_heads
    channels = max(16, triton.next_power_of_2(head_dim))
    blocks = max(16, min(_MEANS, _MEAN_VALUES // channels))
    partials = _Partials.allocate(view, view.num_tiles, group, blocks)
    _mean_scores_kernel[(num_heads, view.num_tiles)](
        query,
        *query.stride()[:2],
        means.contiguous(),
        partials.weights,
        partials.maxima,
        view.scale,
        view.num_rows,
        view.first_block,
        view.num_blocks,
        partials.maxima.shape[-1],
        GROUP=group,
        TILE=view.block_size,
        ROWS=max(16, triton.next_power_of_2(view.block_size)),
        BLOCKS=blocks,
        HEAD_DIM=head_dim,
        CHANNELS=channels,
        num_warps=8,
        num_stages=2,
    )
    shares = means.new_empty(view.num_kv_heads, view.num_tiles, view.num_blocks)
    partials.merge(shares, 0, view.first_block, 1.0)
    return shares


def can_estimate_antidiagonals(view: PrefillView, stride: int) -> bool:
    """Whether a block has no more cells than a program holds, and as many as it can add up."""
    per_block = view.block_size // stride
    return per_block & (per_block - 1) == 0 and per_block <= _num_cells(view)


def antidiagonal_shares(view: PrefillView, stride: int) -> torch.Tensor:
    """[Hkv, N, M] float32 shares of blocks by antidiagonals (``xattention``), averaged over heads.

    Rows of a tile are cut into groups of ``stride``; each group's shares are normalised.
    """
    group, per_tile = view.query.shape[1] // view.num_kv_heads, view.block_size // stride
    cells = _num_cells(view)
    shape = (view.num_kv_heads, view.num_tiles, view.num_blocks)
    shares = view.query.new_empty(shape, dtype=torch.float32)
    held = view.num_kv_heads * group * per_tile * view.num_blocks
    step = max(1, _MAX_HELD // held)
    for first in range(0, view.num_tiles, step):
        num_tiles = min(step, view.num_tiles - first)
        partials = _Partials.allocate(view, num_tiles, group * per_tile, cells // per_tile)
        _antidiagonals(view, stride, cells, first, partials)
        partials.merge(shares, first, view.first_block + first, 1.0 / group)
    return shares


def _antidiagonals(
    view: PrefillView, stride: int, cells: int, first_tile: int, partials: "_Partials"
) -> None:
    query, per_tile = row_major(view.query), view.block_size // stride
    num_heads, num_tiles, rows_of_tile, num_blocks = partials.weights.shape
    grid = (
        partials.maxima.shape[-1],
        triton.cdiv(num_tiles * rows_of_tile, cells),
        num_heads,
    )
    _antidiagonal_kernel[grid](
        query,
        *query.stride()[:2],
        view.keys,
        *view.keys.stride()[:3],
        view.pages,
        partials.weights,
        partials.maxima,
        view.scale,
        view.num_rows,
        view.kv_len,
        view.first_block,
        first_tile,
        num_tiles,
        num_blocks,
        GROUP=rows_of_tile // per_tile,
        STRIDE=stride,
        PER_BLOCK=per_tile,
        CELLS=cells,
        HEAD_DIM=query.shape[2],
        CHANNELS=max(16, triton.next_power_of_2(query.shape[2])),
        num_warps=8,
        num_stages=3 if view.keys.element_size() < 4 else 2,
    )


def _num_cells(view: PrefillView) -> int:
    row_bytes: int = triton.next_power_of_2(view.keys.shape[3]) * view.keys.element_size()
    return max(16, min(_CELLS, _CELL_BYTES // row_bytes))


class _Partials:
    """What lies between the two launches.

    Attributes:
        weights: [Hkv, n, rows, M] float32 sums of exp(score - maximum of the chunk of blocks).
        maxima: [Hkv, n, rows, chunks] float32.
        chunk: Blocks of a chunk.
    """

    def __init__(self, weights: torch.Tensor, maxima: torch.Tensor, chunk: int) -> None:
        self.weights, self.maxima, self.chunk = weights, maxima, chunk

    @classmethod
    def allocate(cls, view: PrefillView, num_tiles: int, num_rows: int, chunk: int) -> "_Partials":
        shape = (view.num_kv_heads, num_tiles, num_rows)
        num_chunks = triton.cdiv(view.num_blocks, chunk)
        weights = view.query.new_empty(*shape, view.num_blocks, dtype=torch.float32)
        return cls(weights, weights.new_empty(*shape, num_chunks), chunk)

    def merge(self, shares: torch.Tensor, tile: int, first_block: int, factor: float) -> None:
        """Write tiles from ``tile`` on of ``shares`` [Hkv, N, M]; the first lies in this block."""
        num_heads, num_tiles, num_rows, num_blocks = self.weights.shape
        _merge_kernel[(num_tiles, num_heads)](
            self.weights,
            self.maxima,
            shares[:, tile:],
            shares.stride(0),
            first_block,
            factor,
            num_rows,
            self.maxima.shape[-1],
            CHUNK=self.chunk,
            **row_of(num_blocks),
        )


@triton.jit
def _exact_products(query, means):
    """[ROWS, BLOCKS] products with float32 means that lose nothing to the queries' dtype.

    A float32 number is the sum of three of bfloat16, so tensor cores can be used; float32 queries
    are split by the compiler.
    """
    if query.dtype == tl.float32:
        products = tl.dot(query, tl.trans(means), input_precision="tf32x3")
    else:
        high = means.to(query.dtype)
        rest = means - high.to(tl.float32)
        middle = rest.to(query.dtype)
        low = (rest - middle.to(tl.float32)).to(query.dtype)
        products = tl.dot(query, tl.trans(low))
        products = tl.dot(query, tl.trans(middle), products)
        products = tl.dot(query, tl.trans(high), products)
    return products


@triton.jit(do_not_specialize=["num_rows", "first_block", "num_blocks", "num_chunks"])
def _mean_scores_kernel(
    query, row_stride, head_stride, means, weights, maxima, scale,
    num_rows, first_block, num_blocks, num_chunks,
    GROUP: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
    HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One tile and query head: chunk by chunk of BLOCKS blocks, up to the tile's own."""
    head, tile, num_tiles = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    kv_head = (head // GROUP).to(tl.int64)
    row, channels = tl.arange(0, ROWS), tl.arange(0, CHANNELS)
    is_channel = channels < HEAD_DIM
    is_row = (row < TILE) & (tile * TILE + row < num_rows)
    rows = query + tile.to(tl.int64) * TILE * row_stride + head * head_stride
    mask = is_row[:, None] & is_channel
    block_of_rows = tl.load(rows + row[:, None] * row_stride + channels, mask=mask, other=0.0)
    own = first_block + tile
    place = (kv_head * num_tiles + tile) * GROUP + head % GROUP
    for chunk in range(own // BLOCKS + 1):
        block = chunk * BLOCKS + tl.arange(0, BLOCKS)
        is_seen = block <= own
        at = (kv_head * num_blocks + block)[:, None] * HEAD_DIM + channels
        keys = tl.load(means + at, mask=is_seen[:, None] & is_channel, other=0.0)
        scores = _exact_products(block_of_rows, keys) * scale
        scores = tl.where(is_row[:, None] & is_seen[None, :], scores, float("-inf"))
        highest = tl.max(tl.max(scores, 1), 0)  # the first of the chunk is seen
        total = tl.sum(tl.exp(scores - highest), 0)
        tl.store(weights + place * num_blocks + block, total, mask=is_seen)
        tl.store(maxima + place * num_chunks + chunk, highest)


@triton.jit(do_not_specialize=["first_block", "num_rows", "num_chunks", "num_columns"])
def _merge_kernel(
    weights, maxima, shares, head_stride, first_block, factor, num_rows, num_chunks, num_columns,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum over rows of what each gives to the blocks, every row's shares adding up to one."""
    tile, head, num_tiles = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    columns = tl.arange(0, BLOCK)
    is_seen = columns <= first_block + tile
    total = tl.zeros([BLOCK], tl.float32)
    for row in range(num_rows):
        place = (head * num_tiles + tile) * num_rows + row
        maximum = tl.load(
            maxima + place * num_chunks + columns // CHUNK, mask=is_seen, other=float("-inf")
        )
        weight = tl.load(weights + place * num_columns + columns, mask=is_seen, other=0.0)
        highest = tl.maximum(tl.max(maximum, 0), -3.0e38)  # of a row that does not exist
        weight *= tl.exp(maximum - highest)
        most = tl.max(weight, 0)
        weight /= tl.where(most > 0.0, most, 1.0)
        sum_of_row = fixed_total(weight)
        total += weight / tl.where(sum_of_row > 0.0, sum_of_row, 1.0)
    at = head * head_stride + tile.to(tl.int64) * num_columns + columns
    tl.store(shares + at, total * factor, mask=columns < num_columns)


@triton.jit(
    do_not_specialize=[
        "num_rows", "kv_len", "first_block", "first_tile", "num_tiles", "num_blocks",
    ]
)  # fmt: skip
def _antidiagonal_kernel(
    query, query_row_stride, query_head_stride,
    keys, key_page_stride, key_slot_stride, key_head_stride,
    pages, weights, maxima, scale,
    num_rows, kv_len, first_block, first_tile, num_tiles, num_blocks,
    GROUP: tl.constexpr, STRIDE: tl.constexpr, PER_BLOCK: tl.constexpr, CELLS: tl.constexpr,
    HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """CELLS groups of rows, of any heads and tiles, by CELLS groups of keys.

    Step s multiplies the keys s of all groups with the rows STRIDE - 1 - s. In the first steps the
    key of a group on the diagonal does not come after the row; its other pairs do not count.
    """
    BLOCKS: tl.constexpr = CELLS // PER_BLOCK
    OWN_STEPS: tl.constexpr = STRIDE - STRIDE // 2
    chunk, head = tl.program_id(0), tl.program_id(2).to(tl.int64)
    num_groups = num_tiles * GROUP * PER_BLOCK
    last = tl.minimum((tl.program_id(1) + 1) * CELLS, num_groups) - 1
    first_block += first_tile
    if chunk * BLOCKS > first_block + last // (GROUP * PER_BLOCK):
        return
    row = tl.program_id(1) * CELLS + tl.arange(0, CELLS)
    tile, member = row // (GROUP * PER_BLOCK), row // PER_BLOCK % GROUP
    cell = chunk * CELLS + tl.arange(0, CELLS)
    block = cell // PER_BLOCK
    own_cell = (first_block + tile) * PER_BLOCK + row % PER_BLOCK
    token = (first_tile + tile) * (PER_BLOCK * STRIDE) + row % PER_BLOCK * STRIDE
    token = tl.where(row < num_groups, token, num_rows)
    count = tl.minimum(tl.maximum(num_rows - token, 0), STRIDE)
    page = tl.load(pages + block, mask=block < num_blocks, other=0).to(tl.int64)
    channels = tl.arange(0, CHANNELS)
    is_channel = channels < HEAD_DIM
    rows = query + token.to(tl.int64) * query_row_stride
    rows += (head * GROUP + member) * query_head_stride
    group_keys = keys + page * key_page_stride + head * key_head_stride
    group_keys += cell % PER_BLOCK * STRIDE * key_slot_stride
    products = tl.zeros([CELLS, CELLS], tl.float32)
    for step in range(OWN_STEPS):
        left = tl.load(
            (rows + (STRIDE - 1 - step) * query_row_stride)[:, None] + channels,
            mask=(count > STRIDE - 1 - step)[:, None] & is_channel, other=0.0,
        )  # fmt: skip
        right = tl.load(
            (group_keys + step * key_slot_stride)[:, None] + channels,
            mask=(cell * STRIDE + step < kv_len)[:, None] & is_channel, other=0.0,
        )  # fmt: skip
        products = tl.dot(left, tl.trans(right), products, input_precision="tf32x3")
    own = tl.sum(tl.where(cell[None, :] == own_cell[:, None], products, 0.0), 1)
    for step in range(OWN_STEPS, STRIDE):
        left = tl.load(
            (rows + (STRIDE - 1 - step) * query_row_stride)[:, None] + channels,
            mask=(count > STRIDE - 1 - step)[:, None] & is_channel, other=0.0,
        )  # fmt: skip
        right = tl.load(
            (group_keys + step * key_slot_stride)[:, None] + channels,
            mask=(cell * STRIDE + step < kv_len)[:, None] & is_channel, other=0.0,
        )  # fmt: skip
        products = tl.dot(left, tl.trans(right), products, input_precision="tf32x3")
    num_pairs = tl.maximum(count - STRIDE // 2, 0)
    own = tl.where(num_pairs > 0, own * scale / tl.maximum(num_pairs, 1), float("-inf"))
    scores = products * (scale / tl.maximum(count, 1))[:, None]
    scores = tl.where(cell[None, :] == own_cell[:, None], own[:, None], scores)
    is_hidden = (cell[None, :] > own_cell[:, None]) | (count == 0)[:, None]
    scores = tl.where(is_hidden, float("-inf"), scores)
    highest = tl.max(scores, 1)
    finite = tl.where(highest == float("-inf"), 0.0, highest)
    exponentials = tl.exp(scores - finite[:, None])
    totals = tl.sum(tl.reshape(exponentials, [CELLS, BLOCKS, PER_BLOCK]), 2)
    blocks = chunk * BLOCKS + tl.arange(0, BLOCKS)
    at = head * num_groups + row
    mask = (row < num_groups)[:, None] & (blocks < num_blocks)[None, :]
    tl.store(weights + at[:, None] * num_blocks + blocks[None, :], totals, mask=mask)
    tl.store(maxima + at * tl.num_programs(0) + chunk, highest, mask=row < num_groups)
