"""Who runs next: budgets, block boundaries, admission, preemption; and no page is ever lost."""

import random

import pytest

from service.engine.sequence import SamplingParams
from tests.service.engine.scheduling import BLOCK, advance, limited, make, prompted, sequence


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


def test_whoever_waits_is_admitted_by_priority_then_arrival():
    scheduler, _ = make(max_running=1)
    scheduler.add(sequence(8))
    advance(scheduler.schedule())
    late, urgent, early = sequence(8), sequence(8), sequence(8)
    early.arrived_at, urgent.priority = late.arrived_at - 1, -1
    for one in (late, urgent, early):
        scheduler.add(one)
    assert scheduler.waiting == [urgent, early, late]
    assert (scheduler.num_unstarted, scheduler.num_unstarted_tokens) == (3, 24)
    scheduler.remove(scheduler.running[0])
    assert [c.sequence for c in scheduler.schedule()] == [urgent]
    scheduler.remove(early)
    assert (scheduler.num_unstarted, scheduler.num_unstarted_tokens) == (2, 16)


def test_the_lowest_priority_gives_way_even_if_it_is_older():
    scheduler, pages = make(num_pages=6)
    unimportant, important = sequence(16), sequence(16)
    unimportant.priority = 1
    scheduler.add(unimportant)
    scheduler.add(important)
    while not scheduler.preempted:
        advance(scheduler.schedule())
        assert pages.num_used <= 6
    assert scheduler.preempted == [unimportant]


def test_nobody_is_admitted_whose_pages_others_will_need():
    scheduler, pages = make(num_pages=10, max_step_tokens=16)
    first, second = sequence(40), sequence(33)
    scheduler.add(first)
    scheduler.add(second)
    scheduler.schedule()
    assert scheduler.running == [first], "6 and 6 pages are too many, though 8 are free"
    assert pages.num_used == 2
    first.sampling = SamplingParams(max_tokens=1)
    second.sampling = SamplingParams(max_tokens=1)
    scheduler.schedule()
    assert scheduler.running == [first]
    second.prompt_ids = second.prompt_ids[:30]
    scheduler.schedule()
    assert scheduler.running == [first, second]


def test_alone_a_sequence_is_admitted_even_if_its_output_may_not_fit():
    scheduler, _ = make(num_pages=2, max_step_tokens=16)
    scheduler.add(sequence(16))
    assert [c.num_tokens for c in scheduler.schedule()] == [16]


def test_choices_of_a_request_are_admitted_by_what_they_do_not_share():
    scheduler, pages = make(num_pages=9, max_step_tokens=64)
    prompt = list(range(40))
    choices = [prompted(prompt, max_tokens=8) for _ in range(3)]
    for one in choices:
        scheduler.add(one)
    chunks = scheduler.schedule()
    assert [c.sequence for c in chunks] == choices[:1]
    scheduler.advance(chunks)
    advance(chunks)
    chunks = scheduler.schedule()
    assert scheduler.running == choices[:2], "6 pages of the first, 2 of the second"
    assert [c.num_tokens for c in chunks if c.sequence is choices[1]] == [8]
    assert pages.num_used == 7


def test_a_sequence_that_gave_way_takes_over_no_more_than_before():
    scheduler, pages = make(num_pages=20)
    scheduler.add(first := prompted(range(20)))
    chunks = scheduler.schedule()
    scheduler.advance(chunks)
    second = prompted([*range(20), *range(50, 80)])
    scheduler.add(second)
    chunks = scheduler.schedule()
    scheduler.advance(chunks)
    assert second.num_cached_tokens == 16
    scheduler._preempt(second)
    assert pages.num_idle == 4
    scheduler.remove(first)
    [chunk] = scheduler.schedule()
    assert chunk.is_first
    assert (chunk.start, second.num_cached_tokens) == (16, 16), "48 tokens could be found"


@pytest.mark.parametrize("seed", range(40))
def test_random_traffic_with_common_beginnings_ends_and_loses_no_page(seed):
    rng = random.Random(seed)
    scheduler, pages = limited(rng.choice([0.001, 0.024]), num_pages=14, max_step_tokens=40)
    live = []
    for step in range(400):
        if step < 200 and rng.random() < 0.3:
            stem = [rng.choice([1, 2])] * rng.choice([8, 16, 24, 40])
            one = prompted([*stem, *range(rng.randrange(12))], max_tokens=rng.randint(1, 30))
            one.priority = rng.choice([0, 0, 1])
            live.append(one)
            scheduler.add(one)
        chunks = scheduler.schedule()
        assert sum(c.num_tokens for c in chunks) <= 40
        assert all(c.sequence.num_cached_tokens < c.sequence.num_prompt_tokens for c in chunks)
        writing = [
            page
            for c in chunks
            for page in c.sequence.pages[c.start // BLOCK : -(-c.stop // BLOCK)]
        ]
        owned = [page for s in live for page in s.pages]
        assert all(owned.count(page) == 1 for page in writing)
        assert pages.num_used == len(set(owned))
        assert scheduler._num_queued_tokens == sum(s.num_tokens for s in scheduler.waiting)
        scheduler.advance(chunks)
        advance(chunks)
        for done in [
            s for s in live if len(s.output_ids) >= s.sampling.max_tokens or rng.random() < 0.005
        ]:
            scheduler.remove(done)
            live.remove(done)
    assert not live, "somebody starves"
    assert pages.num_used == 0
