"""The kernels behind ``triton_samples``: what sampled rows of query tiles look at."""

import math

import triton
import triton.language as tl

from sparse_methods.kernels.triton_lists import fixed_total

_LOG2_E = tl.constexpr(math.log2(math.e))
_LN_2 = tl.constexpr(math.log(2.0))


@triton.jit
def _last_row(tile, num_rows, TILE: tl.constexpr):
    """Number within a tile of its last row."""
    return tl.minimum(TILE, num_rows - tile * TILE) - 1


@triton.jit(
    do_not_specialize=[
        "kv_len", "num_places", "num_blocks", "num_rows", "first_tile", "first_block",
    ]
)  # fmt: skip
def block_sums_kernel(
    query, query_row, query_head, keys, key_page, key_slot, key_head, pages, scale, kv_len,
    weights, maxima, num_places, num_blocks, num_rows, first_tile, first_block,
    HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr, GROUP: tl.constexpr, SAMPLES: tl.constexpr,
    STRIDE: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr,
    SPAN: tl.constexpr,
):  # fmt: skip
    """ROWS sampled rows by SPAN blocks: sums of exponentials, and maxima by powers of two."""
    head = tl.program_id(2).to(tl.int64)
    place = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    is_place = place < num_places
    last_place = tl.minimum((tl.program_id(1) + 1) * ROWS, num_places) - 1
    last_block = first_block + first_tile + last_place // (GROUP * SAMPLES)
    start = tl.program_id(0) * SPAN
    stop = tl.minimum(start + SPAN, last_block + 1)
    tile = first_tile + place // (GROUP * SAMPLES)
    row = _last_row(tile, num_rows, TILE) - place % SAMPLES * STRIDE
    is_row = is_place & (row >= 0)
    position = tl.where(is_row, (first_block + tile) * TILE + row, -1)  # which sees nothing
    channels = tl.arange(0, CHANNELS)
    is_channel = channels < HEAD_DIM
    rows = query + (tile * TILE + row).to(tl.int64) * query_row
    rows += (head * GROUP + place // SAMPLES % GROUP) * query_head
    left = tl.load(rows[:, None] + channels, mask=is_row[:, None] & is_channel, other=0.0)
    slot = tl.arange(0, SLOTS)
    keys += head * key_head
    for block in range(start, stop):
        page = tl.load(pages + block).to(tl.int64)
        key = block * TILE + slot
        is_key = (slot < TILE) & (key < kv_len)  # what nobody wrote may be anything
        right = tl.load(
            keys + page * key_page + slot[:, None] * key_slot + channels,
            mask=is_key[:, None] & is_channel, other=0.0,
        )  # fmt: skip
        products = tl.dot(left, tl.trans(right), input_precision="tf32x3")
        key = tl.where(is_key, key, kv_len)
        is_seen = key[None, :] <= position[:, None]
        scores = tl.where(is_seen, products * (scale * _LOG2_E), float("-inf"))
        highest = tl.max(scores, 1)
        finite = tl.where(highest == float("-inf"), 0.0, highest)
        total = tl.sum(tl.exp2(scores - finite[:, None]), 1)
        at = (head * num_blocks + block) * num_places + place
        tl.store(weights + at, total, mask=is_place)
        tl.store(maxima + at, highest, mask=is_place)


@triton.jit(
    do_not_specialize=[
        "num_places", "num_blocks", "all_tiles", "num_rows", "first_tile", "first_block",
        "num_columns",
    ]
)  # fmt: skip
def finish_kernel(
    weights, maxima, mass, norms,
    num_places, num_blocks, all_tiles, num_rows, first_tile, first_block, num_columns,
    GROUP: tl.constexpr, SAMPLES: tl.constexpr, STRIDE: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile and query head: mean of its rows' shares of blocks, which each add up to one."""
    slab_tile, head = tl.program_id(0), tl.program_id(1)
    tile, kv_head = first_tile + slab_tile, (head // GROUP).to(tl.int64)
    count = _last_row(tile, num_rows, TILE) // STRIDE + 1
    columns = tl.arange(0, BLOCK)
    is_seen = columns <= first_block + tile
    at = (kv_head * num_blocks + columns) * num_places
    at += (slab_tile * GROUP + head % GROUP) * SAMPLES
    place = head.to(tl.int64) * all_tiles + tile
    shares = tl.zeros([BLOCK], tl.float32)
    for step in range(count):  # one by one, so that the order does not depend on the columns
        maximum = tl.load(maxima + at + step, mask=is_seen, other=float("-inf"))
        weight = tl.load(weights + at + step, mask=is_seen, other=0.0)
        highest = tl.max(maximum, 0)
        weight *= tl.exp2(maximum - highest)
        most = tl.max(weight, 0)
        weight /= most
        total = fixed_total(weight)
        shares += weight / total
        tl.store(norms + place * SAMPLES + step, highest * _LN_2 + tl.log(most * total))
    at = place * num_columns + columns
    tl.store(mass + at, shares / count, mask=columns < num_columns)


@triton.jit(do_not_specialize=["kv_len", "num_rows", "first_block"])
def own_means_kernel(
    query, query_row, query_head, keys, key_page, key_slot, key_head, pages, scale, kv_len,
    means, num_rows, first_block,
    HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr, GROUP: tl.constexpr, STRIDE: tl.constexpr,
    TILE: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """One tile and query head."""
    tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    own = first_block + tile
    row = _last_row(tile, num_rows, TILE) - tl.arange(0, ROWS) * STRIDE
    channels = tl.arange(0, CHANNELS)
    is_channel = channels < HEAD_DIM
    rows = query + (tile * TILE + row).to(tl.int64) * query_row + head * query_head
    left = tl.load(rows[:, None] + channels, mask=(row >= 0)[:, None] & is_channel, other=0.0)
    page = tl.load(pages + own).to(tl.int64)
    first = keys + page * key_page + head // GROUP * key_head
    sums = tl.zeros([ROWS], tl.float32)
    for start in range(0, TILE, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        mask = ((slot < TILE) & (own * TILE + slot < kv_len))[:, None] & is_channel
        right = tl.load(first + slot[:, None] * key_slot + channels, mask=mask, other=0.0)
        products = tl.dot(left, tl.trans(right), input_precision="tf32x3")
        sums += tl.sum(tl.where(slot[None, :] <= row[:, None], products, 0.0), 1)
    num_pairs = tl.sum(tl.maximum(row + 1, 0), 0)
    place = head * tl.num_programs(0) + tile
    tl.store(means + place, tl.sum(sums, 0) * scale / num_pairs)


@triton.jit(
    do_not_specialize=[
        "kv_len", "num_rows", "first_tile", "first_block", "num_tiles", "all_tiles", "num_lines",
        "first_choice", "recent",
    ]
)  # fmt: skip
def lines_kernel(
    query, query_row, query_head, keys, key_page, key_slot, key_head, pages, scale, kv_len,
    norms, sums, num_rows, first_tile, first_block, num_tiles, all_tiles, num_lines,
    first_choice, recent,
    HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr, GROUP: tl.constexpr, MEMBERS: tl.constexpr,
    SAMPLES: tl.constexpr, STRIDE: tl.constexpr, SHIFT: tl.constexpr, TILE: tl.constexpr,
    ROWS: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """LINES lines of the tiles and heads of ROWS rows, which take turns at the sampled ones."""
    TILES: tl.constexpr = ROWS // MEMBERS
    head = tl.program_id(2).to(tl.int64)
    last_tile = tl.minimum((tl.program_id(1) + 1) * TILES, num_tiles) - 1
    if tl.program_id(0) * LINES >= (first_block + first_tile + last_tile + 1) * TILE:
        return
    place = tl.arange(0, ROWS)
    slab_tile = tl.program_id(1) * TILES + place // MEMBERS
    tile = first_tile + slab_tile
    own = first_block + tile
    query_heads = head * GROUP + place % MEMBERS
    exists = (slab_tile < num_tiles) & (place % MEMBERS < GROUP)
    last = _last_row(tile, num_rows, TILE)
    first_key, stop = first_choice * TILE, (own + 1 - recent) * TILE
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    channels = tl.arange(0, CHANNELS)
    is_channel = channels < HEAD_DIM
    keys += head * key_head
    norms_at = norms + (query_heads * all_tiles + tile) * SAMPLES
    # Heads without a say have norms of inf; where no head has one, nothing is multiplied.
    least = tl.min(tl.load(norms_at, mask=exists, other=float("inf")), 0)
    num_steps = tl.where(least < float("inf"), SAMPLES, 0)
    attention = tl.zeros([ROWS, LINES], tl.float32)
    for step in range(num_steps):
        row = last - step * STRIDE
        is_row = exists & (row >= 0)
        rows = query + (tile * TILE + row).to(tl.int64) * query_row + query_heads * query_head
        left = tl.load(rows[:, None] + channels, mask=is_row[:, None] & is_channel, other=0.0)
        norm = tl.load(norms_at + step, mask=is_row, other=float("inf")) * _LOG2_E
        key = line - step * SHIFT
        is_key = (key >= first_key) & (key < kv_len)
        page = tl.load(pages + key // TILE, mask=is_key, other=0).to(tl.int64)
        at = page * key_page + key % TILE * key_slot
        mask = is_key[:, None] & is_channel
        right = tl.load(keys + at[:, None] + channels, mask=mask, other=0.0)
        products = tl.dot(left, tl.trans(right), input_precision="tf32x3")
        shares = tl.exp2(products * (scale * _LOG2_E) - norm[:, None])
        key = tl.where(is_key, key, kv_len)
        limit = tl.minimum(own * TILE + row + 1, stop)
        attention += tl.where(key[None, :] < limit[:, None], shares, 0.0)
    by_tile = tl.sum(tl.reshape(attention, [TILES, MEMBERS, LINES]), 1)
    slab_tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    count = _last_row(first_tile + slab_tile, num_rows, TILE) // STRIDE + 1
    by_tile /= (tl.maximum(count, 1) * GROUP)[:, None]
    at = (head * num_tiles + slab_tile)[:, None] * num_lines + line[None, :]
    mask = (slab_tile < num_tiles)[:, None] & (line < num_lines)[None, :]
    tl.store(sums + at, by_tile, mask=mask)
