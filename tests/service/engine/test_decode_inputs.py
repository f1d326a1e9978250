"""Host buffers that are rewritten in part hold what buffers written from nothing hold."""

import gc
import math
import random

import pytest
import torch

from service.engine.decode_inputs import DENSE, NUM_FIELDS, TOKEN, HostInputs
from service.engine.scheduler import Chunk
from service.engine.sequence import SamplingParams, Sequence
from service.models.method_fault import MethodFaultError
from sparse_methods import get_sparse_method

BLOCK = 16
NUM_ROWS, NUM_PAGES = 6, 8
SELECTING = get_sparse_method("streaming")({"dense_below": 60})
METHODS = [
    get_sparse_method("dense")(),
    SELECTING,
    get_sparse_method("flash_skip_softmax")({"prefill_threshold": 0.5, "decode_threshold": 0.25}),
]


def inputs() -> HostInputs:
    return HostInputs((NUM_ROWS, NUM_PAGES), (SELECTING,), (99, 77), is_pinned=False)


def sequence(rng: random.Random, slot: int) -> Sequence:
    one = Sequence(
        request_id="r",
        prompt_ids=[rng.randrange(4000) for _ in range(rng.randint(1, 70))],
        method=rng.choice(METHODS),
        sampling=SamplingParams(),
        generator=torch.Generator(),
        output_ids=[5],
        slot=slot,
    )
    give_pages(one, rng)
    return one


def give_pages(one: Sequence, rng: random.Random) -> None:
    while len(one.pages) * BLOCK < one.num_tokens:
        one.pages.append(rng.randrange(90))


def same(one: HostInputs, other: HostInputs) -> bool:
    return torch.equal(one.fields, other.fields) and torch.equal(one.thresholds, other.thresholds)


@pytest.mark.parametrize("seed", range(20))
def test_buffers_in_use_hold_what_new_ones_would(seed):
    rng = random.Random(seed)
    used = inputs()
    live = [sequence(rng, slot) for slot in range(4)]
    for _ in range(60):
        event = rng.random()
        if event < 0.2:
            live[rng.randrange(len(live))] = sequence(rng, rng.randrange(20))
        elif event < 0.3:
            rng.shuffle(live)
        elif event < 0.4:  # preempted, and back with other pages in the same slot
            one = rng.choice(live)
            one.num_preemptions += 1
            one.pages.clear()
        elif event < 0.5 and len(live) < NUM_ROWS:
            live.append(sequence(rng, 30))
        elif event < 0.6 and len(live) > 1:
            live.pop()
        for one in live:
            if one.num_tokens < NUM_PAGES * BLOCK:
                one.output_ids.append(rng.randrange(4000))
            give_pages(one, rng)
        chunks = [Chunk(one, one.num_tokens - 1, 1) for one in live]
        fresh = inputs()
        fresh.describe(chunks)
        used.describe(chunks)
        assert same(used, fresh)


def test_a_row_says_what_its_sequence_is():
    rng, one = random.Random(0), inputs()
    long = sequence(rng, 3)
    long.method, long.prompt_ids, long.output_ids = SELECTING, [1] * 59, [8]
    skipping = sequence(rng, 4)
    skipping.method = METHODS[2]
    for each in (long, skipping):
        each.pages.clear()
        give_pages(each, rng)
    one.describe([Chunk(each, each.num_tokens - 1, 1) for each in (long, skipping)])
    first = one.fields[0].tolist()
    padding = [0] * (NUM_PAGES - len(long.pages))
    assert first == [8, 59, 3, 59, 0, 0, *long.pages, *padding]
    expected = [-math.inf, math.log(0.25)] + [-math.inf] * 4
    assert one.thresholds.tolist() == pytest.approx(expected)
    assert one.fields[2].tolist() == [0, 0, 77, 1, DENSE, 0, 99] + [0] * (NUM_PAGES - 1)
    assert one.fields.shape == (NUM_ROWS, NUM_FIELDS + NUM_PAGES)


def test_a_step_that_could_not_be_described_leaves_nothing_behind(monkeypatch):
    rng, one = random.Random(0), inputs()
    one.describe([])
    rows = [sequence(rng, slot) for slot in range(3)]
    rows[0].method, rows[1].method, rows[2].method = METHODS
    chunks = [Chunk(row, row.num_tokens - 1, 1) for row in rows]
    with monkeypatch.context() as broken:
        broken.setattr(type(METHODS[2]), "skip_threshold", lambda *_: 1 / 0)
        with pytest.raises(MethodFaultError):
            one.describe(chunks)
    one.describe(chunks[:1])
    fresh = inputs()
    fresh.describe(chunks[:1])
    assert same(one, fresh)


def test_a_pending_token_is_a_reference_to_its_slot():
    one, row = inputs(), sequence(random.Random(1), 5)
    row.num_pending_tokens = 1
    give_pages(row, random.Random(2))
    one.describe([Chunk(row, row.num_tokens - 1, 1)])
    assert one.fields[0, TOKEN] == ~5
    assert row.tokens(0, row.num_tokens) == [*row.prompt_ids, 5, ~5]


def test_buffers_keep_no_ended_sequence_alive():
    one = inputs()
    ended = sequence(random.Random(1), 0)
    one.describe([Chunk(ended, ended.num_tokens - 1, 1)])
    del ended
    gc.collect()
    assert one._tenants[0] is not None
    assert one._tenants[0].sequence() is None
