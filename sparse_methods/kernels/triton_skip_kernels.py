"""The Triton kernel behind ``triton_prefill`` with thresholds; shapes as in ``operation``.

A step takes two blocks: their scores, then one vote of all rows on both, then the values of those
that somebody keeps. So the tensor cores wait for one reduction where they would wait for two. The
running maximum passes through both in their order, as if they had come one by one.
"""

import triton
import triton.language as tl

from sparse_methods.kernels.triton_prefill_kernels import (
    VARYING,
    base_2_scores,
    described,
    first_visible,
    load_tile,
    tile_and_head,
)

_SECOND = tl.constexpr(1024)  # what a row's vote for the second block counts; more rows than a tile


@triton.jit
def _visited(
    visit,
    num_visits,
    page_row,
    listed,
    num_listed,
    first,
    last,
    is_diagonal_first,
    HAS_LISTS: tl.constexpr,
):
    """Logical block of a visit, its page, and whether the tile sees it."""
    block = first + visit
    block = tl.where(is_diagonal_first, tl.where(visit == 0, last, block - 1), block)
    if HAS_LISTS:
        entry = tl.load(listed + visit, mask=visit < num_listed, other=0)
        block = tl.where(num_listed >= 0, entry, block)
    page = tl.load(page_row + tl.minimum(tl.maximum(block, first), last))
    return block, page, (visit < num_visits) & (block >= first) & (block <= last)


@triton.jit
def _hide(scores, begin, slots, is_visible, position, all_see, first_seen, last_seen):
    """Scores [M, N] of keys from ``begin`` on, -inf where the row does not see the key."""
    if (begin + slots.shape[0] > position + 1) | (begin < all_see) | (not is_visible):
        at = begin + slots
        is_seen = (at[None, :] <= last_seen[:, None]) & is_visible
        is_seen = is_seen & (at[None, :] >= first_seen[:, None])
        scores = tl.where(is_seen, scores, float("-inf"))
    return scores


@triton.jit
def _add(scores, factor, shift, values, denominator, accumulator):
    """Add a block's weights and their product with its values to the sums."""
    weights = tl.exp2(scores * factor - shift[:, None])
    denominator += tl.sum(weights, 1)
    accumulator = tl.dot(weights.to(values.dtype), values, accumulator, input_precision="ieee")
    return denominator, accumulator


@triton.jit(do_not_specialize=VARYING)
def attend_tile_with_threshold(
    query, keys, values, output, lse, skipped, table, order, pages, indices, counts,
    log_thresholds, diagonal_first, sinks,
    query_row, query_head, key_page, key_slot, key_head, value_page, value_slot, value_head,
    pages_request, indices_tile, indices_head, counts_tile, counts_head,
    num_tiles, heads_at_once, scale,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    PADDED_HEAD_DIM: tl.constexpr, PADDED_VALUE_DIM: tl.constexpr, BLOCK: tl.constexpr,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, SOFTCAP: tl.constexpr,
    USE_TMA: tl.constexpr, IN_PAIRS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of one query head; ``triton_prefill`` explains the arguments."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    LN_2: tl.constexpr = 0.6931471805599453
    PER_STEP: tl.constexpr = 2 if IN_PAIRS else 1
    HAS_LISTS: tl.constexpr = indices is not None

    # Which tile, which head --------------------------------------------------------------------
    tile, head = tile_and_head(order, num_tiles, heads_at_once)
    kv_head = head // GROUP
    first_row, num_rows, position, request = described(table, tile)
    page_row = pages + request * pages_request
    kv_len = position + num_rows

    # What it sees ------------------------------------------------------------------------------
    rows = tl.arange(0, BLOCK)
    slots = tl.arange(0, BLOCK)
    columns = tl.arange(0, PADDED_HEAD_DIM)
    value_columns = tl.arange(0, PADDED_VALUE_DIM)
    is_row = rows < num_rows
    last_seen = tl.minimum(position + rows, kv_len - 1)  # rows of padding see what the last sees
    first_seen = first_visible(last_seen, WINDOW, CHUNK)
    first_key = first_visible(position, WINDOW, CHUNK)
    all_see = first_visible(kv_len - 1, WINDOW, CHUNK)  # keys between it and position
    first, last = first_key // BLOCK, (kv_len - 1) // BLOCK
    num_listed, listed, is_diagonal_first = -1, pages, False
    num_visits = last - first + 1
    if HAS_LISTS:
        num_listed = tl.load(counts + tile * counts_tile + kv_head * counts_head)
        listed = indices + tile.to(tl.int64) * indices_tile + kv_head * indices_head
        num_visits = tl.where(num_listed >= 0, num_listed, num_visits)
    if diagonal_first is not None:
        is_diagonal_first = tl.load(diagonal_first + tile) != 0
    log_threshold = tl.load(log_thresholds + tile) * LOG2_E

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
    num_skipped = 0
    for step in tl.range(0, (num_visits + PER_STEP - 1) // PER_STEP, num_stages=STAGES):
        block, page, is_visible = _visited(
            step * PER_STEP, num_visits, page_row, listed, num_listed,
            first, last, is_diagonal_first, HAS_LISTS,
        )  # fmt: skip
        key_tile = load_tile(
            keys, page, 0, key_page, key_slot, kv_head, key_offsets,
            columns < HEAD_DIM, slots >= 0, HEAD_DIM, BLOCK, USE_TMA,
        )  # fmt: skip
        if IN_PAIRS:
            next_block, next_page, is_next_visible = _visited(
                step * 2 + 1, num_visits, page_row, listed, num_listed,
                first, last, is_diagonal_first, HAS_LISTS,
            )  # fmt: skip
            next_key_tile = load_tile(
                keys, next_page, 0, key_page, key_slot, kv_head, key_offsets,
                columns < HEAD_DIM, slots >= 0, HEAD_DIM, BLOCK, USE_TMA,
            )  # fmt: skip
        scores = base_2_scores(rows_of_query, key_tile, scale, SOFTCAP)
        scores = _hide(
            scores, block * BLOCK, slots, is_visible, position, all_see, first_seen, last_seen
        )
        highest = tl.max(scores, 1) * factor
        new_maximum = tl.maximum(maximum, highest)
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)  # rows without a key yet
        votes = ((highest - shift > log_threshold) & is_row).to(tl.int32)
        if IN_PAIRS:
            next_scores = base_2_scores(rows_of_query, next_key_tile, scale, SOFTCAP)
            next_scores = _hide(
                next_scores, next_block * BLOCK, slots, is_next_visible,
                position, all_see, first_seen, last_seen,
            )  # fmt: skip
            highest = tl.max(next_scores, 1) * factor
            new_maximum = tl.maximum(new_maximum, highest)
            shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
            votes += ((highest - shift > log_threshold) & is_row).to(tl.int32) * _SECOND
        votes = tl.sum(votes, 0)
        is_kept = votes % _SECOND > 0
        num_skipped += (is_visible & (not is_kept)).to(tl.int32)
        if IN_PAIRS:
            num_skipped += (is_next_visible & (votes < _SECOND)).to(tl.int32)
        # Where a block is dropped, no row of it is a new maximum: the sums stay as they are.
        if votes > 0:
            rescale = tl.exp2(maximum - shift)
            denominator *= rescale
            accumulator *= rescale[:, None]
            if is_kept:
                # What nobody wrote may be anything. Scores hide it, but 0 * inf is not 0.
                value_tile = load_tile(
                    values, page, 0, value_page, value_slot, kv_head, value_offsets,
                    value_columns < VALUE_DIM, block * BLOCK + slots < kv_len,
                    VALUE_DIM, BLOCK, USE_TMA,
                )  # fmt: skip
                denominator, accumulator = _add(
                    scores, factor, shift, value_tile, denominator, accumulator
                )
            if IN_PAIRS:
                if votes >= _SECOND:
                    next_value_tile = load_tile(
                        values, next_page, 0, value_page, value_slot, kv_head, value_offsets,
                        value_columns < VALUE_DIM, next_block * BLOCK + slots < kv_len,
                        VALUE_DIM, BLOCK, USE_TMA,
                    )  # fmt: skip
                    denominator, accumulator = _add(
                        next_scores, factor, shift, next_value_tile, denominator, accumulator
                    )
        maximum = new_maximum

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
    tl.store(skipped + tile * NUM_HEADS + head, num_skipped)
