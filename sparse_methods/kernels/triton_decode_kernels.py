"""The device code of ``triton_decode``: one program per group of heads, split and row.

Shape legend, besides that of ``views``: n rows of this launch, S splits of a row, E entries of a
row's visiting order. Scores and maxima are in base 2. Partial results: outputs [n, Hq, S, Dv], not
yet divided by the sums [n, Hq, S] of weights, which are relative to the maxima [n, Hq, S].
"""

import triton
import triton.language as tl

from sparse_methods.kernels.triton_launch import await_earlier

_LN_2 = tl.constexpr(0.6931471805599453)
_LOG2_E = tl.constexpr(1.4426950408889634)
_VARYING = ["num_splits", "pages_stride", "capacity"]  # no reason to compile anew


@triton.jit
def _visible(tile, tiles, BLOCK: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """Position of the row, the earliest key it may see, and the blocks of both."""
    position = tl.load(tiles + tile * 4 + 2)
    first_key = position * 0
    if WINDOW:
        first_key = tl.maximum(first_key, position - WINDOW + 1)
    if CHUNK:
        first_key = tl.maximum(first_key, position // CHUNK * CHUNK)
    return position, first_key, first_key // BLOCK, position // BLOCK


@triton.jit
def _num_entries(row, first, last, counts):
    """Entries that the row visits, those of a list that it does not see included."""
    number = last - first + 1
    if counts is not None:
        listed = tl.load(counts + row)
        number = tl.where(listed >= 0, listed, number)
    return number


@triton.jit
def _split_size(number, SPLIT: tl.constexpr, LEAST_SPLITS: tl.constexpr):
    """Entries of a split of a row that visits so many."""
    return tl.minimum(tl.maximum(number // LEAST_SPLITS, 1), SPLIT)


@triton.jit
def _bounds(split, row, first, last, counts, SPLIT: tl.constexpr, LEAST_SPLITS: tl.constexpr):
    """Where the entries of a split start and stop, of those that the row visits."""
    number = _num_entries(row, first, last, counts)
    size = _split_size(number, SPLIT, LEAST_SPLITS)
    return split * size, tl.minimum((split + 1) * size, number)


@triton.jit
def _entries(place, stop, row, tile, first, last, counts, lists, capacity, diagonal_first):
    """Blocks at places of the visiting order, and which of those before a stop the row visits."""
    block = first + place
    if diagonal_first is not None:
        last_first = tl.where(place == 0, last, block - 1)
        block = tl.where(tl.load(diagonal_first + tile) != 0, last_first, block)
    if counts is not None:
        is_listed = tl.load(counts + row) >= 0
        entries = lists + row.to(tl.int64) * capacity + place
        listed = tl.load(entries, mask=place < tl.where(is_listed, stop, 0), other=0)
        block = tl.where(is_listed, listed, block)
    return block, (place < stop) & (block >= first) & (block <= last)


@triton.jit
def _pages(block, is_visited, tile, tiles, pages, pages_stride):
    """Physical pages of the blocks; 0 for those that are not visited."""
    request = tl.load(tiles + tile * 4 + 3).to(tl.int64)
    return tl.load(pages + request * pages_stride + block, mask=is_visited, other=0).to(tl.int64)


@triton.jit
def _load_query(
    query, row_stride, head_stride, first_row, head, GROUP: tl.constexpr, HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """[HEADS, CHANNELS] row of each head of the group; padding is zero."""
    heads, channels = tl.arange(0, HEADS), tl.arange(0, CHANNELS)
    offsets = (head * GROUP + heads)[:, None] * head_stride + channels
    mask = (heads < GROUP)[:, None] & (channels < HEAD_DIM)
    return tl.load(query + first_row.to(tl.int64) * row_stride + offsets, mask=mask, other=0.0)


@triton.jit
def _scores(
    rows, keys, slot_stride, slots, is_seen, factor, SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """[HEADS, STEP] scores in base 2 of keys of one page; -inf where the row sees none."""
    channels = tl.arange(0, CHANNELS)
    pointers = keys + slots[:, None] * slot_stride + channels
    if HEAD_DIM == CHANNELS and BLOCK % STEP == 0:
        block = tl.load(pointers)
    else:
        block = tl.load(pointers, (slots < BLOCK)[:, None] & (channels < HEAD_DIM), other=0.0)
    scores = tl.dot(rows, block.to(rows.dtype).T, input_precision="ieee") * factor
    if SOFTCAP > 0.0:
        scores = SOFTCAP * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * scores)))  # tanh
    return tl.where(is_seen, scores, float("-inf"))


@triton.jit
def _weigh(
    weights, values, slot_stride, slots, is_seen, VALUE_DIM: tl.constexpr, CHANNELS: tl.constexpr
):
    """[HEADS, CHANNELS] product of weights with values; slots that nobody wrote are not read."""
    channels = tl.arange(0, CHANNELS)
    mask = is_seen[:, None] & (channels < VALUE_DIM)
    block = tl.load(values + slots[:, None] * slot_stride + channels, mask=mask, other=0.0)
    return tl.dot(weights.to(block.dtype), block, input_precision="ieee")


@triton.jit
def _at(values, is_chosen):
    """The value at the one chosen place: without a load, which the loop would wait for."""
    return tl.sum(tl.where(is_chosen, values, 0))


@triton.jit
def _store_partial(
    place, first_head, split, num_heads, num_splits, outputs, maxima, sums, output, maximum, total,
    GROUP: tl.constexpr, HEADS: tl.constexpr, VALUE_DIM: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    heads, channels = tl.arange(0, HEADS), tl.arange(0, CHANNELS)
    at = (place.to(tl.int64) * num_heads + first_head + heads) * num_splits + split
    tl.store(maxima + at, maximum, mask=heads < GROUP)
    tl.store(sums + at, total, mask=heads < GROUP)
    mask = (heads < GROUP)[:, None] & (channels < VALUE_DIM)
    tl.store(outputs + at[:, None] * VALUE_DIM + channels, output, mask=mask)


@triton.jit
def _larger(left, right):
    return tl.maximum(left, right)


@triton.jit(do_not_specialize=_VARYING)
def attend_kernel(
    query, query_row_stride, query_head_stride,
    keys, key_page_stride, key_slot_stride, key_head_stride, factor,
    values, value_page_stride, value_slot_stride, value_head_stride,
    outputs, maxima, sums,
    indices, tiles, counts, num_splits,
    pages, pages_stride, lists, capacity, diagonal_first,
    BLOCK: tl.constexpr, SPLIT: tl.constexpr, LEAST_SPLITS: tl.constexpr,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    GROUP: tl.constexpr, HEADS: tl.constexpr, STEP: tl.constexpr,
    SOFTCAP: tl.constexpr, HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_CHANNELS: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Partial results of one split without thresholds: an online softmax over its blocks."""
    await_earlier(IS_DEPENDENT)
    head, split, place = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_kv_heads = tl.num_programs(0)
    tile = tl.load(indices + place)
    row = tile * num_kv_heads + head
    position, first_key, first, last = _visible(tile, tiles, BLOCK, WINDOW, CHUNK)
    start, stop = _bounds(split, row, first, last, counts, SPLIT, LEAST_SPLITS)
    if start >= stop:
        return
    at = tl.arange(0, SPLIT)
    block, is_visited = _entries(
        start + at, stop, row, tile, first, last, counts, lists, capacity, diagonal_first
    )
    page = _pages(block, is_visited, tile, tiles, pages, pages_stride)
    block = tl.where(is_visited, block, last + 1)  # of which the row sees nothing
    rows = _load_query(
        query, query_row_stride, query_head_stride, tl.load(tiles + tile * 4), head,
        GROUP, HEADS, HEAD_DIM, CHANNELS,
    )  # fmt: skip
    keys += head.to(tl.int64) * key_head_stride
    values += head.to(tl.int64) * value_head_stride
    maximum = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    output = tl.zeros([HEADS, VALUE_CHANNELS], tl.float32)
    STEPS: tl.constexpr = (BLOCK + STEP - 1) // STEP
    for step in range((stop - start) * STEPS):
        is_current = at == step // STEPS
        current_page = _at(page, is_current)
        slots = step % STEPS * STEP + tl.arange(0, STEP)
        seen_keys = _at(block, is_current) * BLOCK + slots
        is_seen = (slots < BLOCK) & (seen_keys <= position) & (seen_keys >= first_key)
        scores = _scores(
            rows, keys + current_page * key_page_stride, key_slot_stride, slots, is_seen,
            factor, SOFTCAP, BLOCK, STEP, HEAD_DIM, CHANNELS,
        )  # fmt: skip
        higher = tl.maximum(maximum, tl.max(scores, 1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen so far
        weights = tl.exp2(scores - finite[:, None])
        rescale = tl.exp2(maximum - finite)
        total = total * rescale + tl.sum(weights, 1)
        output = output * rescale[:, None] + _weigh(
            weights, values + current_page * value_page_stride, value_slot_stride, slots, is_seen,
            VALUE_DIM, VALUE_CHANNELS,
        )  # fmt: skip
        maximum = higher
    _store_partial(
        place, head * GROUP, split, num_kv_heads * GROUP, num_splits, outputs, maxima, sums,
        output, maximum, total, GROUP, HEADS, VALUE_DIM, VALUE_CHANNELS,
    )  # fmt: skip


@triton.jit(do_not_specialize=_VARYING)
def score_kernel(
    query, query_row_stride, query_head_stride,
    keys, key_page_stride, key_slot_stride, key_head_stride, factor,
    all_scores, block_maxima, split_maxima,
    indices, tiles, counts, num_splits,
    pages, pages_stride, lists, capacity, diagonal_first,
    BLOCK: tl.constexpr, SPLIT: tl.constexpr, LEAST_SPLITS: tl.constexpr,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    GROUP: tl.constexpr, HEADS: tl.constexpr, STEP: tl.constexpr,
    SOFTCAP: tl.constexpr, HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Scores [n, Hq, E * keys] of one split, and the maximum of each block and of the split."""
    await_earlier(IS_DEPENDENT)
    head, split, place = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_kv_heads = tl.num_programs(0)
    tile = tl.load(indices + place)
    row = tile * num_kv_heads + head
    position, first_key, first, last = _visible(tile, tiles, BLOCK, WINDOW, CHUNK)
    start, stop = _bounds(split, row, first, last, counts, SPLIT, LEAST_SPLITS)
    if start >= stop:
        return
    at = tl.arange(0, SPLIT)
    block, is_visited = _entries(
        start + at, stop, row, tile, first, last, counts, lists, capacity, diagonal_first
    )
    page = _pages(block, is_visited, tile, tiles, pages, pages_stride)
    block = tl.where(is_visited, block, last + 1)
    rows = _load_query(
        query, query_row_stride, query_head_stride, tl.load(tiles + tile * 4), head,
        GROUP, HEADS, HEAD_DIM, CHANNELS,
    )  # fmt: skip
    keys += head.to(tl.int64) * key_head_stride
    heads = tl.arange(0, HEADS)
    STEPS: tl.constexpr = (BLOCK + STEP - 1) // STEP
    first_split = (place.to(tl.int64) * num_kv_heads + head) * GROUP * num_splits
    splits = first_split + heads * num_splits + split
    maximum = tl.full([HEADS], float("-inf"), tl.float32)
    tops = tl.full([HEADS, SPLIT], float("-inf"), tl.float32)
    for step in range((stop - start) * STEPS):
        is_current = at == step // STEPS
        slots = step % STEPS * STEP + tl.arange(0, STEP)
        seen_keys = _at(block, is_current) * BLOCK + slots
        is_seen = (slots < BLOCK) & (seen_keys <= position) & (seen_keys >= first_key)
        scores = _scores(
            rows, keys + _at(page, is_current) * key_page_stride, key_slot_stride, slots, is_seen,
            factor, SOFTCAP, BLOCK, STEP, HEAD_DIM, CHANNELS,
        )  # fmt: skip
        written = (splits * (SPLIT * STEPS) + step)[:, None] * STEP + tl.arange(0, STEP)
        tl.store(all_scores + written, scores, mask=(heads < GROUP)[:, None])
        top = tl.max(scores, 1)
        maximum = tl.maximum(maximum, top)
        tops = tl.where(is_current, tl.maximum(tops, top[:, None]), tops)
    tl.store(split_maxima + splits, maximum, mask=heads < GROUP)
    tl.store(block_maxima + splits[:, None] * SPLIT + at, tops, mask=(heads < GROUP)[:, None])


@triton.jit(do_not_specialize=_VARYING)
def weigh_kernel(
    all_scores, block_maxima, split_maxima, log_thresholds, skipped, unread_keys,
    values, value_page_stride, value_slot_stride, value_head_stride,
    outputs, maxima, sums,
    indices, tiles, counts, num_splits,
    pages, pages_stride, lists, capacity, diagonal_first,
    BLOCK: tl.constexpr, SPLIT: tl.constexpr, LEAST_SPLITS: tl.constexpr,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    GROUP: tl.constexpr, HEADS: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_CHANNELS: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Partial results of one split from its scores: only blocks that a head keeps are read.

    Counts are added by integer atomics, whose order does not matter.
    """
    await_earlier(IS_DEPENDENT)
    head, split, place = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_kv_heads = tl.num_programs(0)
    tile = tl.load(indices + place)
    row = tile * num_kv_heads + head
    position, first_key, first, last = _visible(tile, tiles, BLOCK, WINDOW, CHUNK)
    start, stop = _bounds(split, row, first, last, counts, SPLIT, LEAST_SPLITS)
    if start >= stop:
        return
    at = tl.arange(0, SPLIT)
    block, is_visited = _entries(
        start + at, stop, row, tile, first, last, counts, lists, capacity, diagonal_first
    )
    page = _pages(block, is_visited, tile, tiles, pages, pages_stride)
    heads = tl.arange(0, HEADS)
    first_split = (place.to(tl.int64) * num_kv_heads + head) * GROUP * num_splits
    splits = first_split + heads * num_splits + split
    before = tl.full([HEADS, WIDTH], float("-inf"), tl.float32)
    for first_earlier in range(0, split, WIDTH):
        earlier = first_earlier + tl.arange(0, WIDTH)
        mask = (heads < GROUP)[:, None] & (earlier < split)
        pointers = split_maxima + first_split + heads[:, None] * num_splits + earlier
        before = tl.maximum(before, tl.load(pointers, mask, other=float("-inf")))
    before = tl.max(before, 1)
    is_block = (heads < GROUP)[:, None] & is_visited
    tops = tl.load(block_maxima + splits[:, None] * SPLIT + at, is_block, other=float("-inf"))
    running = tl.maximum(tl.associative_scan(tops, 1, _larger), before[:, None])
    running = tl.where(running == float("-inf"), 0.0, running)  # nothing seen so far
    threshold = tl.load(log_thresholds + tile) * _LOG2_E
    is_kept = (is_block & (tops - running > threshold)).to(tl.int32)
    is_read = tl.max(is_kept, 0)
    num_skipped = tl.sum(is_block.to(tl.int32) - is_kept, 1)
    tl.atomic_add(skipped + row * GROUP + heads, num_skipped, mask=heads < GROUP)
    num_keys = tl.minimum(position + 1 - block * BLOCK, BLOCK)
    num_unread = tl.sum(tl.where(is_visited & (is_read == 0), num_keys, 0))
    tl.atomic_add(unread_keys + row, num_unread)

    values += head.to(tl.int64) * value_head_stride
    maximum = tl.maximum(before, tl.max(tops, 1))
    finite = tl.where(maximum == float("-inf"), 0.0, maximum)
    totals = tl.zeros([HEADS, STEP], tl.float32)  # reduced in the loop, it stops Triton 3.6
    output = tl.zeros([HEADS, VALUE_CHANNELS], tl.float32)
    rank = tl.cumsum(is_read, 0) - is_read
    STEPS: tl.constexpr = (BLOCK + STEP - 1) // STEP
    for step in range(tl.sum(is_read) * STEPS):
        is_current = (is_read != 0) & (rank == step // STEPS)
        slots = step % STEPS * STEP + tl.arange(0, STEP)
        seen_keys = _at(block, is_current) * BLOCK + slots
        is_seen = (slots < BLOCK) & (seen_keys <= position) & (seen_keys >= first_key)
        read = splits * (SPLIT * STEPS) + _at(at, is_current) * STEPS + step % STEPS
        pointers = all_scores + read[:, None] * STEP + tl.arange(0, STEP)
        is_kept_now = tl.sum(tl.where(is_current, is_kept, 0), 1) != 0
        scores = tl.load(pointers, mask=(heads < GROUP)[:, None], other=float("-inf"))
        weights = tl.where(is_kept_now[:, None], tl.exp2(scores - finite[:, None]), 0.0)
        totals += weights
        output += _weigh(
            weights, values + _at(page, is_current) * value_page_stride, value_slot_stride, slots,
            is_seen, VALUE_DIM, VALUE_CHANNELS,
        )  # fmt: skip
    _store_partial(
        place, head * GROUP, split, num_kv_heads * GROUP, num_splits, outputs, maxima, sums,
        output, maximum, tl.sum(totals, 1), GROUP, HEADS, VALUE_DIM, VALUE_CHANNELS,
    )  # fmt: skip


@triton.jit(do_not_specialize=_VARYING)
def merge_kernel(
    outputs, maxima, sums, sinks, merged, lse,
    indices, tiles, counts, num_splits,
    BLOCK: tl.constexpr, SPLIT: tl.constexpr, LEAST_SPLITS: tl.constexpr,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr, VALUE_DIM: tl.constexpr,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Output channels and LSE of one row and query head, from its splits in their order."""
    await_earlier(IS_DEPENDENT)
    head, place = tl.program_id(1), tl.program_id(2)
    num_heads = tl.num_programs(1)
    tile = tl.load(indices + place)
    _, _, first, last = _visible(tile, tiles, BLOCK, WINDOW, CHUNK)
    list_row = tile * (num_heads // GROUP) + head // GROUP
    number = _num_entries(list_row, first, last, counts)
    size = _split_size(number, SPLIT, LEAST_SPLITS)
    channels = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    first_split = (place.to(tl.int64) * num_heads + head) * num_splits
    maximum = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    if sinks is not None:  # a key of this score, without a value
        maximum = tl.load(sinks + head + tl.arange(0, 1)).to(tl.float32) * _LOG2_E
        total += 1.0
    output = tl.zeros([CHANNELS], tl.float32)
    for start in range(0, (number + size - 1) // size, WIDTH):
        split = start + tl.arange(0, WIDTH)
        is_split = split * size < number
        at = first_split + split
        tops = tl.load(maxima + at, mask=is_split, other=float("-inf"))
        higher = tl.maximum(maximum, tl.max(tops, 0))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        scale = tl.exp2(tops - finite)
        rescale = tl.exp2(maximum - finite)
        total = total * rescale + tl.sum(tl.load(sums + at, mask=is_split, other=0.0) * scale, 0)
        mask = is_split[:, None] & (channels < VALUE_DIM)
        parts = tl.load(outputs + at[:, None] * VALUE_DIM + channels, mask=mask, other=0.0)
        output = output * rescale + tl.sum(parts * scale[:, None], 0)
        maximum = higher
    row = tl.load(tiles + tile * 4).to(tl.int64) * num_heads + head
    tl.store(lse + row + tl.arange(0, 1), (maximum + tl.log2(total)) * _LN_2)
    output = (output / total).to(merged.dtype.element_ty)
    tl.store(merged + row * VALUE_DIM + channels, output, mask=channels < VALUE_DIM)
