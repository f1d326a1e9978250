"""Which blocks a threshold keeps: rounded scores must decide exactly as float32 scores do."""

import math

import pytest
import torch

from sparse_methods.kernels import cpu_skip
from sparse_methods.kernels.cpu_skip import SkipRule

SIZE, GROUP, HEADS, DIM = 16, 3, 2, 32


@pytest.fixture(params=[True, False], ids=["bfloat16", "float32"])
def rounds(request, monkeypatch):
    monkeypatch.setattr(cpu_skip, "multiplies_bfloat16", lambda: request.param)
    monkeypatch.setattr(cpu_skip, "_MANY_ROWS", 4)
    return request.param


def written_out(query, keys, position, listed, log_threshold):
    """[G, m] bool by loops over rows and blocks, in double precision."""
    kept = torch.zeros(query.shape[0], len(listed), dtype=torch.bool)
    closest = math.inf
    for member in range(query.shape[0]):
        for row in range(query.shape[1]):
            scores = keys[: position + row + 1].double() @ query[member, row].double()
            running = -math.inf
            for place, block in enumerate(listed):
                seen = scores[block * SIZE : (block + 1) * SIZE]
                top = float(seen.max()) if len(seen) else -math.inf
                running = max(running, top)
                kept[member, place] |= top - running > log_threshold
                closest = min(closest, abs(top - running - log_threshold))
    assert closest > 1e-6  # else float32 itself may decide otherwise
    return kept


def draw(num_keys, num_rows, spread):
    generator = torch.Generator().manual_seed(num_keys)
    keys = torch.randn(num_keys, HEADS, DIM, generator=generator).transpose(0, 1)
    for quiet in (3, 5):  # blocks that nobody looks at
        keys[:, quiet * SIZE : (quiet + 1) * SIZE] *= 0.02
    return torch.randn(GROUP, num_rows, DIM, generator=generator) * spread, keys


ORDERS = {
    "ascending": lambda own: list(range(own + 1)),
    "own first": lambda own: [own, *range(own)],
    "listed": lambda own: [own, 0, *range(3, own, 2)],
    "without its own": lambda own: [2, 0, 5],
}


@pytest.mark.usefixtures("rounds")
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize(("position", "num_rows"), [(160, 16), (160, 5), (167, 6), (165, 1)])
def test_blocks_are_kept_as_by_the_rule_written_out(order, position, num_rows):
    query, keys = draw(position + num_rows, num_rows, 2.0)
    listed, log_threshold = order(position // SIZE), math.log(0.5)
    kept = SkipRule(keys, SIZE).kept(query, 1, position, listed, log_threshold)
    assert torch.equal(kept, written_out(query, keys[1], position, listed, log_threshold))
    assert 0 < kept.sum() < kept.numel()


@pytest.mark.usefixtures("rounds")
def test_the_first_block_alone_is_kept():
    query, keys = draw(16, 16, 1.0)
    kept = SkipRule(keys, SIZE).kept(query, 0, 0, [0], math.log(0.5))
    assert kept.tolist() == [[True]] * GROUP


def test_rounded_scores_within_their_error_of_the_threshold_are_computed_again(monkeypatch):
    monkeypatch.setattr(cpu_skip, "multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(cpu_skip, "_MANY_ROWS", 1)
    log_threshold, decided = math.log(0.5), []
    for step in range(-4, 5):  # closer to the threshold than bfloat16 can tell
        query = torch.ones(1, 1, 1)
        keys = torch.zeros(1, 2 * SIZE + 1, 1)
        keys[0, -1], keys[0, 0], keys[0, SIZE] = 30.0, 30.0 + log_threshold + step * 1e-4, 0.0
        decided += SkipRule(keys, SIZE).kept(query, 0, 2 * SIZE, [2, 0, 1], log_threshold).tolist()
    assert [row[1] for row in decided[:4]] == [False] * 4
    assert [row[1] for row in decided[5:]] == [True] * 4
    assert not any(row[2] for row in decided)


def test_the_error_covers_what_rounding_changes(monkeypatch):
    monkeypatch.setattr(cpu_skip, "multiplies_bfloat16", lambda: True)
    worst = 0.0
    for seed in range(20):
        query, keys = draw(160 + seed, 16, 3.0)
        rule = SkipRule(keys, SIZE)
        rounded = query.to(torch.bfloat16)
        maxima = cpu_skip._maxima(rounded, keys[0, :160].to(torch.bfloat16), SIZE)
        exact = cpu_skip._maxima(query, keys[0, :160], SIZE)
        error = rule._error(query, rounded, 0, maxima)
        worst = max(worst, float(((maxima - exact).abs() / error).max()))
    assert 0.05 < worst < 1
