"""Prompt tiles on Hopper, in Gluon: one warp loads, two groups of warps compute half a tile each.

A group's products of one block (scores of this one, weighted values of the last one) are under
way while the other takes its exponentials; nobody tells them to take turns, they fall into it.
Keys and values come by the tensor memory accelerator, a few blocks ahead. A tile visits its own
block first, the only one where causality hides keys.

Source: FlashAttention-3, https://arxiv.org/abs/2407.08608, algorithm 1.
Departures: no barrier orders the two groups, and exponentials of a block do not overlap with the
    values of the last one in the same group: both were measured, and were slower.
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
def _block_at(visit, num_visits, listed, num_listed, last, HAS_LISTS: gl.constexpr):
    """Logical block of a visit, from the last one on; -1 for what the tile does not see."""
    block = last - visit
    if HAS_LISTS:
        entry = gl.load(listed + (num_visits - 1 - visit), mask=visit < num_listed, other=-1)
        block = gl.where(num_listed >= 0, entry, block)
        block = gl.where(block <= last, block, -1)
    return block


@gluon.jit
def _send(source, row, column, ring, visit, STAGES: gl.constexpr):
    """Copy the block at ``row`` to its place in the ring, once everybody has read what is there."""
    tiles, arrived, read = ring
    place = visit % STAGES
    mbarrier.wait(read.index(place), ((visit // STAGES) & 1) ^ 1)
    mbarrier.expect(arrived.index(place), source.block_type.nbytes)
    async_load(source, [row, column], arrived.index(place), tiles.index(place))


@gluon.jit
def _awaited(ring, visit, num_visits, STAGES: gl.constexpr):
    """The block of a visit, once it is there; a list without blocks must not wait for any."""
    tiles, arrived, _ = ring
    place = visit % STAGES
    mbarrier.wait(arrived.index(place), (visit // STAGES) & 1, pred=visit < num_visits)
    return tiles.index(place)


@gluon.jit
def _load(
    keys, values, key_ring, value_ring, page_row, kv_head, walk,
    HAS_LISTS: gl.constexpr, BLOCK: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Keys and values of every visit, each as soon as its ring has room."""
    listed, num_listed, last, num_visits = walk
    block = _block_at(0, num_visits, listed, num_listed, last, HAS_LISTS)
    page = gl.load(page_row + gl.maximum(block, 0))
    for visit in range(num_visits):
        row = (page * BLOCK).to(gl.int32)
        _send(keys, row, kv_head * DIM, key_ring, visit, STAGES)
        following = gl.minimum(visit + 1, num_visits - 1)  # looked up while the keys travel
        block = _block_at(following, num_visits, listed, num_listed, last, HAS_LISTS)
        page = gl.load(page_row + gl.maximum(block, 0))
        _send(values, row, kv_head * DIM, value_ring, visit, STAGES)


@gluon.jit
def _attend(
    HALF: gl.constexpr, query, query_row, query_tiles, key_ring, value_ring, output, lse,
    walk, first_row, num_rows, position, head, scale,
    NUM_HEADS: gl.constexpr, HAS_LISTS: gl.constexpr,
    BLOCK: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Rows of one half of a tile."""
    LOG2_E: gl.constexpr = 1.4426950408889634
    LN_2: gl.constexpr = 0.6931471805599453
    HEIGHT: gl.constexpr = BLOCK // 2
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    LOADED: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    listed, num_listed, last, num_visits = walk
    key_tiles, _, keys_read = key_ring
    _, _, values_read = value_ring

    # Queries -----------------------------------------------------------------------------------
    loaded_rows = HALF * HEIGHT + gl.arange(0, HEIGHT, gl.SliceLayout(1, LOADED))
    loaded_columns = gl.arange(0, DIM, gl.SliceLayout(0, LOADED))
    query_tile = query_tiles.index(HALF)
    query_tile.store(load_rows(query, first_row, loaded_rows, num_rows, query_row, loaded_columns))
    fence_async_shared()

    # The tile's own block ----------------------------------------------------------------------
    rows = HALF * HEIGHT + gl.arange(0, HEIGHT, ROWS)
    slots = gl.arange(0, BLOCK, gl.SliceLayout(0, SCORES))
    last_seen = position + gl.minimum(rows, num_rows - 1)
    factor = scale * LOG2_E
    no_scores = gl.zeros([HEIGHT, BLOCK], gl.float32, SCORES)
    keys = _awaited(key_ring, 0, num_visits, STAGES)
    scores = warpgroup_mma(query_tile, keys.permute((1, 0)), no_scores, use_acc=False)
    mbarrier.arrive(keys_read.index(0))
    block = _block_at(0, num_visits, listed, num_listed, last, HAS_LISTS)
    is_seen = (block * BLOCK + slots[None, :] <= last_seen[:, None]) & (block >= 0)
    scores = gl.where(is_seen, scores, float("-inf"))
    maximum = gl.max(scores, 1) * factor
    shift = maximum
    if HAS_LISTS:  # which need not name it; rows then have not seen a key yet
        shift = gl.where(maximum == float("-inf"), 0.0, maximum)
    weights = gl.exp2(scores * factor - shift[:, None])
    denominator = gl.sum(weights, 1)
    operand = gl.convert_layout(weights.to(key_tiles.dtype), WEIGHTS)
    accumulator = gl.zeros([HEIGHT, DIM], gl.float32, OUTPUT)

    # Online softmax ----------------------------------------------------------------------------
    for visit in range(1, num_visits):
        keys = _awaited(key_ring, visit, num_visits, STAGES)
        under_way = warpgroup_mma(
            query_tile, keys.permute((1, 0)), no_scores, use_acc=False, is_async=True
        )
        values = _awaited(value_ring, visit - 1, num_visits, STAGES)
        weighted = warpgroup_mma(operand, values, accumulator, is_async=True)
        scores = warpgroup_mma_wait(1, deps=(under_way,))
        mbarrier.arrive(keys_read.index(visit % STAGES))
        if HAS_LISTS:
            block = _block_at(visit, num_visits, listed, num_listed, last, HAS_LISTS)
            if (block == last) | (block < 0):
                is_seen = (block * BLOCK + slots[None, :] <= last_seen[:, None]) & (block >= 0)
                scores = gl.where(is_seen, scores, float("-inf"))
        new_maximum = gl.maximum(maximum, gl.max(scores, 1) * factor)
        shift = new_maximum
        if HAS_LISTS:
            shift = gl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weights = gl.exp2(scores * factor - shift[:, None])
        rescale = gl.exp2(maximum - shift)
        denominator = denominator * rescale + gl.sum(weights, 1)
        maximum = new_maximum
        accumulator = warpgroup_mma_wait(0, deps=(weighted,))
        mbarrier.arrive(values_read.index((visit - 1) % STAGES))
        accumulator *= gl.convert_layout(rescale, gl.SliceLayout(1, OUTPUT))[:, None]
        operand = gl.convert_layout(weights.to(key_tiles.dtype), WEIGHTS)
    values = _awaited(value_ring, gl.maximum(num_visits, 1) - 1, num_visits, STAGES)
    accumulator = warpgroup_mma(operand, values, accumulator)

    # Results -----------------------------------------------------------------------------------
    divisor = gl.convert_layout(denominator, gl.SliceLayout(1, OUTPUT))
    out_rows = HALF * HEIGHT + gl.arange(0, HEIGHT, gl.SliceLayout(1, OUTPUT))
    columns = gl.arange(0, DIM, gl.SliceLayout(0, OUTPUT))
    result = accumulator / divisor[:, None]
    store_rows(output, result, first_row, out_rows, num_rows, head, columns, NUM_HEADS)
    places = (first_row + rows) * NUM_HEADS + head
    gl.store(lse + places, (maximum + gl.log2(denominator)) * LN_2, mask=rows < num_rows)


@gluon.jit
def _ring(like, BLOCK: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr):
    """Places for blocks, and barriers for "it has arrived" and "both groups have read it"."""
    tiles = gl.allocate_shared_memory(like.dtype, [STAGES, BLOCK, DIM], like.layout)
    arrived = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    read = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(arrived.index(stage), count=1)
        mbarrier.init(read.index(stage), count=2)
    return tiles, arrived, read


@gluon.jit(do_not_specialize=VARYING)
def attend_tile(
    query, keys, values, output, lse, table, order, pages, indices, counts,
    query_row, query_head,
    pages_request, indices_tile, indices_head, counts_tile, counts_head,
    num_tiles, heads_at_once, scale,
    NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, DIM: gl.constexpr,
    BLOCK: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr, LOADING_REGISTERS: gl.constexpr,
):  # fmt: skip
    """One tile of one query head; keys and values are descriptors of [P * BLOCK, Hkv * DIM].

    The four warps of the launch are the first group. ``REGISTERS`` are those of a thread of the
    second, ``LOADING_REGISTERS`` of the one that loads; the first group has what they leave.
    """
    HAS_LISTS: gl.constexpr = indices is not None
    tile, head = tile_and_head(order, num_tiles, heads_at_once)
    kv_head = head // GROUP
    first_row, num_rows, position, request = described(table, tile)
    last = (position + num_rows - 1) // BLOCK
    listed, num_listed, num_visits = visits_of(
        tile, kv_head, last + 1, pages, indices, counts,
        indices_tile, indices_head, counts_tile, counts_head, HAS_LISTS,
    )  # fmt: skip
    walk = listed, num_listed, last, num_visits
    query_tiles = gl.allocate_shared_memory(keys.dtype, [2, BLOCK // 2, DIM], keys.layout)
    key_ring, value_ring = _ring(keys, BLOCK, DIM, STAGES), _ring(values, BLOCK, DIM, STAGES)
    fence_async_shared()  # the accelerator must find the barriers as they were initialized
    query += head * query_head
    page_row = pages + request * pages_request
    gl.warp_specialize(
        [
            (
                _attend,
                (
                    gl.constexpr(0), query, query_row, query_tiles, key_ring, value_ring,
                    output, lse, walk, first_row, num_rows, position, head, scale,
                    NUM_HEADS, HAS_LISTS, BLOCK, DIM, STAGES,
                ),
            ),
            (
                _attend,
                (
                    gl.constexpr(1), query, query_row, query_tiles, key_ring, value_ring,
                    output, lse, walk, first_row, num_rows, position, head, scale,
                    NUM_HEADS, HAS_LISTS, BLOCK, DIM, STAGES,
                ),
            ),
            (
                _load,
                (
                    keys, values, key_ring, value_ring, page_row, kv_head, walk,
                    HAS_LISTS, BLOCK, DIM, STAGES,
                ),
            ),
        ],
        [4, 1],
        [REGISTERS, LOADING_REGISTERS],
    )  # fmt: skip
