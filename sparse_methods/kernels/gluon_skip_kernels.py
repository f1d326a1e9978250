"""Prompt tiles with a threshold on Hopper, in Gluon: scores of the next block while one is judged.

The tensor cores compute the next blocks' scores while the other units find the maximum of this
one, vote on it and, if it is kept, weigh it. Keys come by the tensor memory accelerator, several
blocks ahead; values of a block only once it is kept, hidden behind its exponentials.

A round of the loop is two visits: scores then alternate between two sets of registers and are
never copied, and the second product is queued while the first may still run. Nothing is under way
at the end of a round, as the assembler would otherwise let every product wait for itself.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sparse_methods.kernels.gluon_tiles import (
    async_load,
    described,
    load_rows,
    store_rows,
    tile_and_head,
    visits_of,
)
from sparse_methods.kernels.triton_prefill_kernels import VARYING


@gluon.jit
def _block_at(
    visit, num_visits, listed, num_listed, last, is_diagonal_first, HAS_LISTS: gl.constexpr
):
    """Logical block of a visit; -1 behind the end."""
    block = visit
    block = gl.where(is_diagonal_first, gl.where(visit == 0, last, visit - 1), block)
    if HAS_LISTS:
        entry = gl.load(listed + visit, mask=visit < num_listed, other=-1)
        block = gl.where(num_listed >= 0, entry, block)
    return gl.where((visit < num_visits) & (block <= last), block, -1)


@gluon.jit
def _product(query_tile, key_tiles, arrived, no_scores, visit, num_visits, STAGES: gl.constexpr):
    """Scores of a visit, under way; behind the last one those of old keys, which count nowhere."""
    place = visit % STAGES
    mbarrier.wait(arrived.index(place), (visit // STAGES) & 1, pred=visit < num_visits)
    keys = key_tiles.index(place).permute((1, 0))
    return warpgroup_mma(query_tile, keys, no_scores, use_acc=False, is_async=True)


@gluon.jit(do_not_specialize=VARYING)
def attend_tile_with_threshold(
    query, keys, values, output, lse, skipped, table, order, pages, indices, counts,
    log_thresholds, diagonal_first,
    query_row, query_head,
    pages_request, indices_tile, indices_head, counts_tile, counts_head,
    num_tiles, heads_at_once, scale,
    NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, DIM: gl.constexpr,
    BLOCK: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """One tile of one query head; keys and values are descriptors of [P * BLOCK, Hkv * DIM]."""
    LOG2_E: gl.constexpr = 1.4426950408889634
    LN_2: gl.constexpr = 0.6931471805599453
    HAS_LISTS: gl.constexpr = indices is not None
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, DIM, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    # Every warp holds all votes: they pass one barrier, where a reduction across warps has two.
    VOTES: gl.constexpr = gl.BlockedLayout([BLOCK // 32], [32], [WARPS], [0])
    LOADED: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [WARPS, 1], [1, 0])

    # Which tile, which head --------------------------------------------------------------------
    tile, head = tile_and_head(order, num_tiles, heads_at_once)
    kv_head = head // GROUP
    first_row, num_rows, position, request = described(table, tile)
    page_row = pages + request * pages_request
    last = (position + num_rows - 1) // BLOCK
    listed, num_listed, num_visits = visits_of(
        tile, kv_head, last + 1, pages, indices, counts,
        indices_tile, indices_head, counts_tile, counts_head, HAS_LISTS,
    )  # fmt: skip
    is_diagonal_first = gl.load(diagonal_first + tile) != 0
    log_threshold = gl.load(log_thresholds + tile) * LOG2_E

    # Queries, and the first keys ---------------------------------------------------------------
    loaded_rows = gl.arange(0, BLOCK, gl.SliceLayout(1, LOADED))
    loaded_columns = gl.arange(0, DIM, gl.SliceLayout(0, LOADED))
    rows_of_query = load_rows(
        query + head * query_head, first_row, loaded_rows, num_rows, query_row, loaded_columns
    )
    query_tile = gl.allocate_shared_memory(keys.dtype, [BLOCK, DIM], keys.layout)
    key_tiles = gl.allocate_shared_memory(keys.dtype, [STAGES, BLOCK, DIM], keys.layout)
    value_tile = gl.allocate_shared_memory(values.dtype, [BLOCK, DIM], values.layout)
    arrived = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES + 1):
        mbarrier.init(arrived.index(stage), count=1)
    query_tile.store(rows_of_query)
    fence_async_shared()
    for stage in gl.static_range(STAGES):
        block = _block_at(stage, num_visits, listed, num_listed, last, is_diagonal_first, HAS_LISTS)
        page = gl.load(page_row + gl.maximum(block, 0))
        mbarrier.expect(arrived.index(stage), keys.block_type.nbytes, pred=stage < num_visits)
        async_load(
            keys, [(page * BLOCK).to(gl.int32), kv_head * DIM], arrived.index(stage),
            key_tiles.index(stage), pred=stage < num_visits,
        )  # fmt: skip
    ahead = _block_at(STAGES, num_visits, listed, num_listed, last, is_diagonal_first, HAS_LISTS)
    page_ahead = gl.load(page_row + gl.maximum(ahead, 0))

    # Online softmax ----------------------------------------------------------------------------
    rows = gl.arange(0, BLOCK, ROWS)
    slots = gl.arange(0, BLOCK, gl.SliceLayout(0, SCORES))
    is_row = rows < num_rows
    last_seen = position + gl.minimum(rows, num_rows - 1)
    factor = scale * LOG2_E
    maximum = gl.full([BLOCK], float("-inf"), gl.float32, ROWS)
    denominator = gl.full([BLOCK], 0.0, gl.float32, ROWS)
    accumulator = gl.zeros([BLOCK, DIM], gl.float32, OUTPUT)
    no_scores = gl.zeros([BLOCK, BLOCK], gl.float32, SCORES)
    num_skipped = 0
    num_kept = 0
    # A list without blocks is not allowed, and comes out as NaN; nobody may wait for its keys.
    under_way = _product(query_tile, key_tiles, arrived, no_scores, 0, num_visits, STAGES)
    scores = warpgroup_mma_wait(0, deps=(under_way,))
    for first in range(0, num_visits, 2):
        under_way = _product(
            query_tile, key_tiles, arrived, no_scores, first + 1, num_visits, STAGES
        )
        for within_round in gl.static_range(2):
            visit = first + within_round
            block = _block_at(
                visit, num_visits, listed, num_listed, last, is_diagonal_first, HAS_LISTS
            )
            if (block == last) | (block < 0):
                at = block * BLOCK + slots
                is_seen = (at[None, :] <= last_seen[:, None]) & (block >= 0)
                scores = gl.where(is_seen, scores, float("-inf"))
            highest = gl.max(scores, 1) * factor
            new_maximum = gl.maximum(maximum, highest)
            shift = gl.where(new_maximum == float("-inf"), 0.0, new_maximum)  # no key yet
            is_high = (highest - shift > log_threshold) & is_row
            is_kept = gl.max(gl.convert_layout(is_high.to(gl.int32), VOTES), 0) > 0
            # Everybody voted, so everybody has read this visit's keys: their place is free.
            beyond = visit + STAGES
            mbarrier.expect(
                arrived.index(visit % STAGES), keys.block_type.nbytes, pred=beyond < num_visits
            )
            async_load(
                keys, [(page_ahead * BLOCK).to(gl.int32), kv_head * DIM],
                arrived.index(visit % STAGES), key_tiles.index(visit % STAGES),
                pred=beyond < num_visits,
            )  # fmt: skip
            ahead = _block_at(
                beyond + 1, num_visits, listed, num_listed, last, is_diagonal_first, HAS_LISTS
            )
            page_ahead = gl.load(page_row + gl.maximum(ahead, 0))
            # Where a block is dropped, no row of it is a new maximum: the sums stay as they are.
            if is_kept:
                page = gl.load(page_row + gl.maximum(block, 0))
                mbarrier.expect(arrived.index(STAGES), values.block_type.nbytes)
                async_load(
                    values, [(page * BLOCK).to(gl.int32), kv_head * DIM], arrived.index(STAGES),
                    value_tile,
                )  # fmt: skip
                weights = gl.exp2(scores * factor - shift[:, None])
                rescale = gl.exp2(maximum - shift)
                denominator = denominator * rescale + gl.sum(weights, 1)
                accumulator *= gl.convert_layout(rescale, gl.SliceLayout(1, OUTPUT))[:, None]
                operand = gl.convert_layout(weights.to(values.dtype), WEIGHTS)
                mbarrier.wait(arrived.index(STAGES), num_kept & 1)
                accumulator = warpgroup_mma(operand, value_tile, accumulator, is_async=False)
                num_kept += 1
            else:
                num_skipped += (block >= 0).to(gl.int32)
            maximum = new_maximum
            if within_round == 0:
                queued = _product(
                    query_tile, key_tiles, arrived, no_scores, visit + 2, num_visits, STAGES
                )
                scores = warpgroup_mma_wait(1, deps=(under_way,))
                under_way = queued
            else:
                scores = warpgroup_mma_wait(0, deps=(under_way,))

    # Results -----------------------------------------------------------------------------------
    for stage in gl.static_range(STAGES + 1):
        mbarrier.invalidate(arrived.index(stage))
    divisor = gl.convert_layout(denominator, gl.SliceLayout(1, OUTPUT))
    result = accumulator / divisor[:, None]
    out_rows = gl.arange(0, BLOCK, gl.SliceLayout(1, OUTPUT))
    columns = gl.arange(0, DIM, gl.SliceLayout(0, OUTPUT))
    store_rows(output, result, first_row, out_rows, num_rows, head, columns, NUM_HEADS)
    places = (first_row + rows) * NUM_HEADS + head
    gl.store(lse + places, (maximum + gl.log2(denominator)) * LN_2, mask=is_row)
    gl.store(skipped + tile * NUM_HEADS + head, num_skipped)
