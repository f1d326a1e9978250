"""Who runs next: budgets, block boundaries, preemption, and that no page is ever lost."""

import random

import pytest
import torch

from service.engine.kv_cache import PageAllocator
from service.engine.scheduler import Limits, Scheduler
from service.engine.sequence import SamplingParams, Sequence
from sparse_methods import get_sparse_method

BLOCK = 8


def sequence(num_prompt, num_output=0):
    return Sequence(
        request_id="r",
        prompt_ids=[5] * num_prompt,
        method=get_sparse_method("dense")(),
        sampling=SamplingParams(),
        generator=torch.Generator(),
        output_ids=[6] * num_output,
    )


def make(num_pages=100, max_step_tokens=64, max_running=4):
    pages = PageAllocator(num_pages, BLOCK)
    return Scheduler(Limits(max_step_tokens, max_running, BLOCK), pages), pages


def advance(chunks, *, generate=True):
    for chunk in chunks:
        chunk.sequence.num_computed_tokens = chunk.stop
        if generate and chunk.sequence.num_uncomputed_tokens == 0:
            chunk.sequence.output_ids.append(7)


def test_a_long_prompt_is_cut_on_block_boundaries_only():
    scheduler, _ = make(max_step_tokens=20)
    scheduler.add(sequence(45))
    stops = []
    while not stops or stops[-1] < 45:
        chunks = scheduler.schedule()
        stops.append(chunks[0].stop)
        advance(chunks)
    assert stops == [16, 32, 45]


def test_decoding_sequences_come_before_a_long_prefill_that_started_earlier():
    scheduler, _ = make(max_step_tokens=16)
    long, short = sequence(100), sequence(3)
    scheduler.add(long)
    advance(scheduler.schedule())
    scheduler.add(short)
    short.output_ids.append(1)
    scheduler.waiting.remove(short)
    scheduler.waiting.append(short)
    long.num_computed_tokens = 88
    advance(scheduler.schedule())  # the rest of long, and short joins
    long.output_ids[:] = []
    chunks = scheduler.schedule()
    assert [c.num_tokens for c in chunks if c.sequence is short] == [1]


def test_the_budget_of_a_step_is_never_exceeded_and_places_are_limited():
    scheduler, _ = make(max_step_tokens=32, max_running=2)
    for _ in range(5):
        scheduler.add(sequence(10))
    chunks = scheduler.schedule()
    assert len(chunks) == 2
    assert sum(c.num_tokens for c in chunks) <= 32


def test_the_youngest_gives_way_when_pages_run_out_and_comes_back_first():
    scheduler, pages = make(num_pages=6)
    old, young = sequence(16), sequence(16)
    scheduler.add(old)
    scheduler.add(young)
    while pages.num_free or old.num_tokens % BLOCK != 1:
        advance(scheduler.schedule())
    scheduler.add(sequence(1))
    chunks = scheduler.schedule()  # both need a fourth page
    assert [c.sequence for c in chunks] == [old]
    assert scheduler.preempted == [young]
    assert scheduler.waiting[0] is young
    assert (young.num_computed_tokens, young.pages, young.slot) == (0, [], None)
    assert young.num_preemptions == 1


def test_a_removed_sequence_leaves_no_page_and_no_slot_behind():
    scheduler, pages = make()
    running, waiting = sequence(16), sequence(16)
    scheduler.add(running)
    scheduler.schedule()
    scheduler.add(waiting)
    scheduler.remove(running)
    scheduler.remove(waiting)
    assert pages.num_used == 0
    assert not scheduler.has_work
    scheduler.remove(running)  # once more changes nothing
    assert pages.num_free == pages.num_pages


@pytest.mark.parametrize("seed", range(40))
def test_random_traffic_keeps_every_limit_and_loses_no_page(seed):
    rng = random.Random(seed)
    scheduler, pages = make(num_pages=12, max_step_tokens=rng.choice([8, 24, 64]), max_running=3)
    lengths, live = {}, []
    for _ in range(120):
        if rng.random() < 0.3 and len(live) < 8:
            new = sequence(rng.randint(1, 60))
            lengths[new] = new.num_prompt_tokens + rng.randint(1, 30)
            live.append(new)
            scheduler.add(new)
        chunks = scheduler.schedule()
        assert sum(c.num_tokens for c in chunks) <= scheduler._limits.max_step_tokens
        assert len({c.sequence for c in chunks}) == len(chunks)
        assert all(c.sequence.slot is not None and c.num_tokens > 0 for c in chunks)
        owned = [page for s in live for page in s.pages]
        assert len(owned) == len(set(owned)) == pages.num_used
        slots = [s.slot for s in live if s.slot is not None]
        assert len(slots) == len(set(slots)) == len(scheduler.running) <= 3
        advance(chunks)
        for done in [s for s in live if s.num_tokens >= lengths[s] or rng.random() < 0.01]:
            scheduler.remove(done)
            live.remove(done)
    steps = 0
    while live:
        advance(scheduler.schedule())
        for done in [s for s in live if s.num_tokens >= lengths[s]]:
            scheduler.remove(done)
            live.remove(done)
        steps += 1
        assert steps < 2000, "somebody starves"
    assert pages.num_used == 0
