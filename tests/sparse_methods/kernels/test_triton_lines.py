"""What kernels choose by lines, against rules in plain loops."""

import pytest
import torch

from sparse_methods.kernels import triton_lines
from tests.sparse_methods.kernels.cases import DEVICE

JUNK = float("nan")  # what lies behind a tile's own block


def lines_of(kind, num_blocks, size, first_block, seed=0):
    """[2, n, num_blocks * size] multiples of 1/64, so that sums are exact and many are equal."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, num_blocks - first_block, num_blocks * size)
    draw = torch.randint(0, 64, shape, generator=generator)
    lines = {
        "many values": draw,
        "few values": draw % 3,
        "equal": torch.full_like(draw, 7),
        "mostly nothing": torch.where(draw < 60, 0, draw),
        "nothing": torch.zeros_like(draw),
        "one": (torch.arange(shape[-1]) == 3).expand(shape).long(),
        "wide range": 2**20 >> (draw % 16),
    }[kind].float() / 64
    for tile in range(shape[1]):
        lines[:, tile, (first_block + tile + 1) * size :] = JUNK
    return lines


KINDS = ["many values", "few values", "equal", "mostly nothing", "nothing", "one", "wide range"]
SHAPES = [(6, 16, 0), (5, 24, 2), (3, 128, 1)]  # blocks, their size, block of the first tile


@pytest.mark.parametrize("share", [0.25, 0.75, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_fewest_lines_that_hold_a_share_in_whole_blocks(kind, shape, share, monkeypatch):
    monkeypatch.setattr(triton_lines, "_HELD", 128)
    num_blocks, size, first_block = shape
    lines = lines_of(kind, num_blocks, size, first_block)
    counts, sums = triton_lines.fewest_blocks(lines.to(DEVICE), first_block, size, share)
    for head in range(2):
        for tile in range(lines.shape[1]):
            stop = (first_block + tile + 1) * size
            row = lines[head, tile, :stop]
            values, held, needed = sorted(row.tolist(), reverse=True), 0.0, 0
            while held < share * sum(values):
                held, needed = held + values[needed], needed + 1
            assert int(counts[head, tile]) == needed // size + 1
            expected = torch.zeros(num_blocks)
            expected[: first_block + tile + 1] = row.unflatten(0, (-1, size)).sum(-1)
            assert torch.equal(sums[head, tile].cpu(), expected)


@pytest.mark.parametrize(("count", "least"), [(1, 0.0), (9, 0.0), (9, 5 / 64), (4096, 0.0)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_that_the_largest_diagonals_cross(kind, shape, count, least, monkeypatch):
    monkeypatch.setattr(triton_lines, "_HELD", 128)
    num_blocks, size, first_block = shape
    lines = lines_of(kind, num_blocks, size, first_block, seed=count)
    given = triton_lines.crossed_blocks(lines.to(DEVICE), first_block, size, count, least)
    for head in range(2):
        for tile in range(lines.shape[1]):
            row = lines[head, tile, : (first_block + tile + 1) * size].tolist()
            ranked = sorted(range(len(row)), key=lambda line: (-row[line], line))[:count]
            chosen = [line for line in ranked if row[line] > least]
            expected = {
                block
                for line in chosen
                for block in (line // size, (line - size + 1) // size)
                if block >= 0
            }
            assert set(given[head, tile].nonzero()[:, 0].tolist()) == expected


def test_no_diagonal_crosses_no_block():
    lines = lines_of("many values", 5, 24, 2)
    assert not triton_lines.crossed_blocks(lines.to(DEVICE), 2, 24, 0, 0.0).any()


def test_zeros_behind_leave_a_decision_as_it_is(monkeypatch):
    monkeypatch.setattr(triton_lines, "_HELD", 64)
    generator = torch.Generator().manual_seed(0)
    row = torch.rand(1, 1, 4 * 16, generator=generator).to(DEVICE) ** 4
    wide = torch.cat([row, torch.zeros(1, 1, 5 * 16, device=DEVICE)], 2)
    narrow_counts, narrow = triton_lines.fewest_blocks(row, 3, 16, 0.7)
    counts, sums = triton_lines.fewest_blocks(wide, 3, 16, 0.7)
    assert torch.equal(counts, narrow_counts)
    assert torch.equal(sums[..., :4], narrow)
    met = triton_lines.crossed_blocks(wide, 3, 16, 2, 0.1)
    assert torch.equal(met[..., :4], triton_lines.crossed_blocks(row, 3, 16, 2, 0.1))
