"""What columns and diagonals of attention choose among blocks, in Triton.

A program decides one tile's lines, too many to hold: it walks over them again and again, each time
closer to the value that separates the chosen from the others. No line is moved or sorted, and a
walk's sums do not change by zeros behind them, so a chunk decides as the whole prompt.
"""

import struct

import torch
import triton
import triton.language as tl

_HELD = 4096  # lines that a program looks at together


def fewest_blocks(
    lines: torch.Tensor, first_block: int, block_size: int, share: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """How many blocks' worth of its largest lines holds a share of a tile's sum.

    Args:
        lines: [Hkv, n, M * block_size] float32, not negative; those behind a tile's own block do
            not count.
        first_block: Block of the first tile; the others follow.
        block_size: Lines of a block.
        share: From 0 to 1.

    Returns:
        [Hkv, n, 1] int32, the fewest lines that reach the share, in whole blocks, and one more;
        and [Hkv, n, M] float32, sums of each block's lines.
    """
    num_heads, num_tiles, num_lines = lines.shape
    counts = torch.empty(num_heads, num_tiles, 1, dtype=torch.int32, device=lines.device)
    sums = lines.new_empty(num_heads, num_tiles, num_lines // block_size)
    _fewest_kernel[(num_tiles, num_heads)](
        lines, counts, sums, share, first_block, sums.shape[2], **_walk(block_size)
    )
    return counts, sums


def crossed_blocks(
    lines: torch.Tensor, first_block: int, block_size: int, count: int, least: float
) -> torch.Tensor:
    """[Hkv, n, M] bool, blocks that a full tile's rows meet on its largest diagonals.

    Args:
        lines: [Hkv, n, M * block_size] float32, not negative, by the key that the last row meets;
            the first row meets one ``block_size - 1`` keys earlier.
        first_block: Block of the first tile; the others follow.
        block_size: Lines of a block.
        count: Most diagonals that are chosen; of equal ones those of earlier keys.
        least: What a diagonal must be above, not negative.
    """
    num_heads, num_tiles, num_lines = lines.shape
    num_blocks = num_lines // block_size
    is_met = torch.zeros(num_heads, num_tiles, num_blocks, dtype=torch.bool, device=lines.device)
    (bits,) = struct.unpack("<i", struct.pack("<f", least))
    _crossed_kernel[(num_tiles, num_heads)](
        lines, is_met.view(torch.uint8), count, bits, first_block, num_blocks, **_walk(block_size)
    )
    return is_met


def _walk(block_size: int) -> dict[str, int]:
    slots = triton.next_power_of_2(block_size)
    return {
        "TILE": block_size,
        "SLOTS": slots,
        "BLOCKS": max(1, _HELD // slots),
        "num_warps": 16,
    }


@triton.jit
def _load_lines(lines, start, own, TILE: tl.constexpr, SLOTS: tl.constexpr, BLOCKS: tl.constexpr):
    """[BLOCKS, SLOTS] lines from a block on; -1 where there is none, less than any."""
    block, slot = start + tl.arange(0, BLOCKS), tl.arange(0, SLOTS)
    mask = (block <= own)[:, None] & (slot < TILE)[None, :]
    return tl.load(lines + block[:, None] * TILE + slot[None, :], mask=mask, other=-1.0)


@triton.jit
def _bits(values):
    """Integers in the order of float32 values that are not negative; negative for the others."""
    return tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)


@triton.jit
def _above(
    lines, least, own, TILE: tl.constexpr, SLOTS: tl.constexpr, BLOCKS: tl.constexpr
):  # fmt: skip
    """Number and sum of the lines whose bits are above ``least``."""
    numbers = tl.zeros([BLOCKS, SLOTS], tl.int32)
    sums = tl.zeros([BLOCKS, SLOTS], tl.float32)
    for start in range(0, own + 1, BLOCKS):
        values = _load_lines(lines, start, own, TILE, SLOTS, BLOCKS)
        is_above = _bits(values) > least
        numbers += is_above.to(tl.int32)
        sums += tl.where(is_above, values, 0.0)
    return tl.sum(tl.sum(numbers, 1), 0), tl.sum(tl.sum(sums, 1), 0)


@triton.jit(do_not_specialize=["first_block", "num_blocks"])
def _fewest_kernel(
    lines, counts, sums, share, first_block, num_blocks,
    TILE: tl.constexpr, SLOTS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    own = first_block + tl.program_id(0)
    lines += place * num_blocks * TILE
    largest = tl.zeros([BLOCKS, SLOTS], tl.float32)
    added = tl.zeros([BLOCKS, SLOTS], tl.float32)
    for start in range(0, num_blocks, BLOCKS):
        values = tl.maximum(_load_lines(lines, start, own, TILE, SLOTS, BLOCKS), 0.0)
        largest = tl.maximum(largest, values)
        added += values
        block = start + tl.arange(0, BLOCKS)
        tl.store(sums + place * num_blocks + block, tl.sum(values, 1), mask=block < num_blocks)
    total = tl.sum(tl.sum(added, 1), 0)
    target = total * share
    # Sought is the least limit such that the lines above it hold less than the target. Before it
    # is found, those above ``high`` are too few lines and those from ``low`` on enough. Lines that
    # together cannot be what the target leaves out need not be tried, half of them for rounding.
    num_lines = (own + 1) * TILE
    low = _bits((total - target) / (2 * num_lines))
    high = tl.maximum(_bits(tl.max(tl.max(largest, 1), 0)), low)
    fewest, enough, held = 0, num_lines, 0.0
    while (low < high) & ((fewest + 1) // TILE < enough // TILE):
        middle = low + (high - low) // 2
        number, mass = _above(lines, middle, own, TILE, SLOTS, BLOCKS)
        is_short = mass < target
        high = tl.where(is_short, middle, high)
        fewest, held = tl.where(is_short, number, fewest), tl.where(is_short, mass, held)
        low = tl.where(is_short, low, middle + 1)
        enough = tl.where(is_short, enough, number)
    if low >= high:  # as many of the equal ones as are needed, one by one
        value = high.to(tl.float32, bitcast=True)
        needed = tl.ceil((target - held) / tl.maximum(value, 1e-38))
        enough = fewest + tl.minimum(needed, (enough - fewest).to(tl.float32)).to(tl.int32)
    tl.store(counts + place, enough // TILE + 1)


@triton.jit(do_not_specialize=["budget", "least", "first_block", "num_blocks"])
def _crossed_kernel(
    lines, is_met, budget, least, first_block, num_blocks,
    TILE: tl.constexpr, SLOTS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    own = first_block + tl.program_id(0)
    lines += place * num_blocks * TILE
    is_met += place * num_blocks
    largest = tl.zeros([BLOCKS, SLOTS], tl.float32)
    numbers = tl.zeros([BLOCKS, SLOTS], tl.int32)
    for start in range(0, own + 1, BLOCKS):
        values = _load_lines(lines, start, own, TILE, SLOTS, BLOCKS)
        largest = tl.maximum(largest, values)
        numbers += (_bits(values) > least).to(tl.int32)
    # The least limit that no more than the budget are above: mostly what they must be above anyway.
    above = tl.sum(tl.sum(numbers, 1), 0)
    low = least
    high = tl.where(above > budget, _bits(tl.max(tl.max(largest, 1), 0)), low)
    above = tl.where(above > budget, 0, above)
    while low < high:
        middle = low + (high - low) // 2
        number, _ = _above(lines, middle, own, TILE, SLOTS, BLOCKS)
        above = tl.where(number <= budget, number, above)
        high = tl.where(number <= budget, middle, high)
        low = tl.where(number <= budget, low, middle + 1)
    spare = tl.where(low > least, budget - above, 0)
    met = tl.zeros([1], tl.int32)
    slot = tl.arange(0, SLOTS)[None, :]
    for start in range(0, own + 1, BLOCKS):
        bits = _bits(_load_lines(lines, start, own, TILE, SLOTS, BLOCKS))
        equal = (bits == low).to(tl.int32)
        in_block = tl.sum(equal, 1)
        earlier = met + tl.cumsum(in_block, 0) - in_block
        rank = earlier[:, None] + tl.cumsum(equal, 1) - equal
        is_chosen = ((bits > low) | ((equal != 0) & (rank < spare))).to(tl.int32)
        met += tl.sum(in_block, 0)
        block = start + tl.arange(0, BLOCKS)
        by_last = tl.max(is_chosen, 1)
        by_first = tl.max(tl.where(slot < TILE - 1, is_chosen, 0), 1)  # starts a block earlier
        tl.store(is_met + block, by_last.to(tl.uint8), mask=by_last != 0)
        tl.store(is_met + block - 1, by_first.to(tl.uint8), mask=(by_first != 0) & (block > 0))
