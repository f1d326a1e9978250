"""What the kernels in Gluon share: the tile and head of a program, and which blocks it reads."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # Triton < 3.9


@gluon.jit
def tile_and_head(order, num_tiles, heads_at_once):
    """What a program computes: heads that share keys side by side, the longest tiles first."""
    program = gl.program_id(0)
    per_section = num_tiles * heads_at_once
    within = program % per_section
    head = program // per_section * heads_at_once + within % heads_at_once
    return gl.load(order + within // heads_at_once), head


@gluon.jit
def described(table, tile):
    """First row, number of rows, position and request of a tile."""
    row = table + tile * 4
    return gl.load(row).to(gl.int64), gl.load(row + 1), gl.load(row + 2), gl.load(row + 3)


@gluon.jit
def visits_of(
    tile, kv_head, num_blocks, pages, indices, counts,
    indices_tile, indices_head, counts_tile, counts_head,
    HAS_LISTS: gl.constexpr,
):  # fmt: skip
    """Where a tile's list begins, its entries (-1: it reads every block), and visits in all.

    Without lists ``pages`` stands for the list that nobody reads.
    """
    listed, num_listed, num_visits = pages, -1, num_blocks
    if HAS_LISTS:
        listed = indices + tile.to(gl.int64) * indices_tile + kv_head * indices_head
        num_listed = gl.load(counts + tile * counts_tile + kv_head * counts_head)
        num_visits = gl.where(num_listed >= 0, num_listed, num_blocks)
    return listed, num_listed, num_visits


@gluon.jit
def load_rows(query, first_row, rows, num_rows, query_row, columns):
    """[len(rows), len(columns)] of one head's queries; 0 behind the tile's last row."""
    offsets = (first_row + rows)[:, None] * query_row + columns[None, :]
    return gl.load(query + offsets, mask=(rows < num_rows)[:, None], other=0.0)


@gluon.jit
def store_rows(output, result, first_row, rows, num_rows, head, columns, NUM_HEADS: gl.constexpr):
    """Write [len(rows), len(columns)] results of one head, contiguous per row and head."""
    places = ((first_row + rows) * NUM_HEADS + head)[:, None] * columns.shape[0] + columns[None, :]
    gl.store(output + places, result.to(output.dtype.element_ty), mask=(rows < num_rows)[:, None])
