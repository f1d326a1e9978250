"""The Triton kernel behind ``triton_prefill`` without thresholds; shapes as in ``operation``.

Scores are kept in base 2: exp2 is an instruction of the hardware and exp is not. A loop over
blocks must carry no value that its body only passes on (``block = next_block``): Triton takes
that for a dependence over two steps and leaves the loop without a software pipeline.
"""

import triton
import triton.language as tl

VARYING = [  # no reason to compile anew
    "pages_request",
    "indices_tile",
    "indices_head",
    "counts_tile",
    "counts_head",
    "num_tiles",
    "heads_at_once",
]


@triton.jit
def base_2_scores(query, keys, scale, SOFTCAP: tl.constexpr):
    """Products of [M, D] and [N, D]; the caller multiplies them by ``scale`` unless SOFTCAP."""
    scores = tl.dot(query, tl.trans(keys), input_precision="ieee")
    if SOFTCAP > 0.0:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1); both constants of base 2 are folded.
        grown = tl.exp2(scores * (scale * 2.0 * 1.4426950408889634 / SOFTCAP))
        scores = (1.0 - 2.0 / (grown + 1.0)) * (SOFTCAP * 1.4426950408889634)
    return scores


@triton.jit
def tile_and_head(order, num_tiles, heads_at_once):
    """What a program computes: heads that share keys side by side, the longest tiles first."""
    program = tl.program_id(0)
    per_section = num_tiles * heads_at_once
    within = program % per_section
    head = program // per_section * heads_at_once + within % heads_at_once
    return tl.load(order + within // heads_at_once), head


@triton.jit
def described(table, tile):
    """First row, number of rows, position and request of a tile."""
    row = table + tile * 4
    return tl.load(row).to(tl.int64), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)


@triton.jit
def first_visible(position, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """``LayerGeometry.first_visible``."""
    first = position * 0
    if WINDOW:
        first = tl.maximum(first, position - WINDOW + 1)
    if CHUNK:
        first = tl.maximum(first, position // CHUNK * CHUNK)
    return first


@triton.jit
def _block_at(visit, listed, num_listed, first, HAS_LISTS: tl.constexpr):
    """Logical block of a visit; behind the end, and for what the list lacks, any block."""
    block = first + visit
    if HAS_LISTS:
        entry = tl.load(listed + visit, mask=visit < num_listed, other=0)
        block = tl.where(num_listed >= 0, entry, block)
    return block


@triton.jit
def load_tile(
    cache,
    page,
    offset,
    stride_page,
    stride_slot,
    kv_head,
    offsets,
    is_column,
    is_slot,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """Keys or values of a sub-tile; ``offsets`` are those within the sub-tile."""
    if USE_TMA:
        tile = cache.load([(page * BLOCK + offset).to(tl.int32), kv_head * DIM])
    else:
        base = cache + page * stride_page + offset * stride_slot
        tile = tl.load(base + offsets, mask=is_slot[:, None] & is_column[None, :], other=0.0)
    return tile


@triton.jit(do_not_specialize=VARYING)
def attend_tile(
    query,
    keys,
    values,
    output,
    lse,
    table,
    order,
    pages,
    indices,
    counts,
    sinks,
    query_row,
    query_head,
    key_page,
    key_slot,
    key_head,
    value_page,
    value_slot,
    value_head,
    pages_request,
    indices_tile,
    indices_head,
    counts_tile,
    counts_head,
    num_tiles,
    heads_at_once,
    scale,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PADDED_HEAD_DIM: tl.constexpr,
    PADDED_VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    SUB_TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FIRST_PHASE: tl.constexpr,
    USE_TMA: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One tile of one query head; ``triton_prefill`` explains the arguments."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    LN_2: tl.constexpr = 0.6931471805599453
    PER_BLOCK: tl.constexpr = BLOCK // SUB_TILE
    HAS_LISTS: tl.constexpr = indices is not None

    # Which tile, which head --------------------------------------------------------------------
    tile, head = tile_and_head(order, num_tiles, heads_at_once)
    kv_head = head // GROUP
    first_row, num_rows, position, request = described(table, tile)
    page_row = pages + request * pages_request
    kv_len = position + num_rows

    # What it sees ------------------------------------------------------------------------------
    rows = tl.arange(0, BLOCK)
    slots = tl.arange(0, SUB_TILE)
    columns = tl.arange(0, PADDED_HEAD_DIM)
    value_columns = tl.arange(0, PADDED_VALUE_DIM)
    is_row = rows < num_rows
    last_seen = tl.minimum(position + rows, kv_len - 1)  # rows of padding see what the last sees
    first_seen = first_visible(last_seen, WINDOW, CHUNK)
    first_key = first_visible(position, WINDOW, CHUNK)
    all_see = first_visible(kv_len - 1, WINDOW, CHUNK)  # keys between it and position
    first, last = first_key // BLOCK, (kv_len - 1) // BLOCK

    num_listed, listed = -1, pages
    if HAS_LISTS:
        num_listed = tl.load(counts + tile * counts_tile + kv_head * counts_head)
        listed = indices + tile.to(tl.int64) * indices_tile + kv_head * indices_head
    num_visits = last - first + 1
    if HAS_LISTS:
        num_visits = tl.where(num_listed >= 0, num_listed, num_visits)

    query_offsets = (first_row + rows)[:, None] * query_row + head * query_head + columns[None, :]
    rows_of_query = tl.load(
        query + query_offsets, mask=is_row[:, None] & (columns < HEAD_DIM)[None, :], other=0.0
    )
    key_offsets = kv_head * key_head + slots[:, None] * key_slot + columns[None, :]
    value_offsets = kv_head * value_head + slots[:, None] * value_slot + value_columns[None, :]

    # Online softmax ----------------------------------------------------------------------------
    factor = scale * LOG2_E if SOFTCAP == 0.0 else 1.0  # of what base_2_scores returns
    maximum = tl.full([BLOCK], float("-inf"), tl.float32)
    denominator = tl.zeros([BLOCK], tl.float32)
    accumulator = tl.zeros([BLOCK, PADDED_VALUE_DIM], tl.float32)
    for phase in tl.static_range(FIRST_PHASE, 3):
        # Steps count sub-tiles from the first block on. Steps between these two need no mask.
        edge_end = tl.maximum((all_see + SUB_TILE - 1) // SUB_TILE - first * PER_BLOCK, 0)
        plain_end = tl.maximum((position + 1) // SUB_TILE - first * PER_BLOCK, edge_end)
        start, stop = 0, num_visits * PER_BLOCK
        if FIRST_PHASE < 2:
            stop = (kv_len - 1) // SUB_TILE + 1 - first * PER_BLOCK
            if phase == 0:
                stop = tl.minimum(edge_end, stop)
            elif phase == 1:
                start, stop = tl.minimum(edge_end, stop), tl.minimum(plain_end, stop)
            else:
                start = tl.minimum(plain_end, stop)
        # Looked up a step ahead, so that the loads of keys and values do not wait for it; not so
        # with lists, whose two lookups ahead are more than Triton 3.6 can pipeline.
        visit = start // PER_BLOCK
        block = _block_at(visit, listed, num_listed, first, HAS_LISTS)
        page = tl.load(page_row + tl.minimum(tl.maximum(block, first), last))
        for step in tl.range(start, stop, num_stages=STAGES, warp_specialize=WARP_SPECIALIZE):
            if HAS_LISTS:
                visit = step // PER_BLOCK
                block = _block_at(visit, listed, num_listed, first, HAS_LISTS)
                page = tl.load(page_row + tl.minimum(tl.maximum(block, first), last))
            offset = step % PER_BLOCK * SUB_TILE
            begin = block * BLOCK + offset
            is_visible = (block >= first) & (block <= last)
            # What nobody wrote may be anything. Scores hide it from the keys, but 0 * inf is not 0.
            is_written = slots >= 0
            if phase != 1:
                is_written = begin + slots < kv_len
            key_tile = load_tile(
                keys,
                page,
                offset,
                key_page,
                key_slot,
                kv_head,
                key_offsets,
                columns < HEAD_DIM,
                slots >= 0,
                HEAD_DIM,
                BLOCK,
                USE_TMA,
            )
            value_tile = load_tile(
                values,
                page,
                offset,
                value_page,
                value_slot,
                kv_head,
                value_offsets,
                value_columns < VALUE_DIM,
                is_written,
                VALUE_DIM,
                BLOCK,
                USE_TMA,
            )
            scores = base_2_scores(rows_of_query, key_tile, scale, SOFTCAP)
            if phase != 1:
                if (begin + SUB_TILE > position + 1) | (begin < all_see) | (not is_visible):
                    at = begin + slots
                    is_seen = (at[None, :] <= last_seen[:, None]) & is_visible
                    is_seen = is_seen & (at[None, :] >= first_seen[:, None])
                    scores = tl.where(is_seen, scores, float("-inf"))
            block_maximum = tl.max(scores, 1) * factor
            new_maximum = tl.maximum(maximum, block_maximum)
            shift = new_maximum
            if phase != 1:  # rows that saw no key yet
                shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
            weights = tl.exp2(scores * factor - shift[:, None])
            rescale = tl.exp2(maximum - shift)
            denominator = denominator * rescale + tl.sum(weights, 1)
            accumulator = tl.dot(
                weights.to(value_tile.dtype),
                value_tile,
                accumulator * rescale[:, None],
                input_precision="ieee",
            )
            maximum = new_maximum
            if not HAS_LISTS:
                visit = (step + 1) // PER_BLOCK
                block = _block_at(visit, listed, num_listed, first, HAS_LISTS)
                page = tl.load(page_row + tl.minimum(tl.maximum(block, first), last))

    # Results -----------------------------------------------------------------------------------
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2_E
        with_sink = tl.maximum(maximum, sink)
        rescale = tl.exp2(maximum - with_sink)
        denominator = denominator * rescale + tl.exp2(sink - with_sink)
        accumulator = accumulator * rescale[:, None]
        maximum = with_sink
    result = accumulator / denominator[:, None]
    places = (first_row + rows) * NUM_HEADS + head
    tl.store(
        output + places[:, None] * VALUE_DIM + value_columns[None, :],
        result.to(output.dtype.element_ty),
        mask=is_row[:, None] & (value_columns < VALUE_DIM)[None, :],
    )
    tl.store(lse + places, (maximum + tl.log2(denominator)) * LN_2, mask=is_row)
