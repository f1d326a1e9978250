"""Who runs next: budgets, block boundaries, preemption, and that no page is ever lost."""

import math
import random

import pytest
import torch

from service.engine.kv_cache import PageAllocator
from service.engine.prefix import PrefixKeys
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


def limited(max_prefill_s, num_pages=100, max_step_tokens=64):
    """A scheduler that believes in 1000 tokens of prompts per second."""
    pages = PageAllocator(num_pages, BLOCK)
    scheduler = Scheduler(Limits(max_step_tokens, 8, BLOCK, max_prefill_s), pages)
    scheduler.prompts.note_pace(500, 0.5)
    return scheduler, pages


def of(sequence, chunks):
    return sum(c.num_tokens for c in chunks if c.sequence is sequence)


def test_beside_somebody_who_decodes_a_step_takes_few_tokens_of_prompts():
    scheduler, _ = limited(0.016)
    short, long = sequence(4), sequence(200)
    scheduler.add(short)
    advance(scheduler.schedule())
    scheduler.add(long)
    while long.num_uncomputed_tokens > 1:
        chunks = scheduler.schedule()
        assert of(short, chunks) == 1, "decoding waits for nobody"
        assert of(long, chunks) <= 16
        advance(chunks)
    scheduler.remove(short)
    scheduler.remove(long)
    scheduler.add(sequence(100))
    assert sum(c.num_tokens for c in scheduler.schedule()) == 64, "nobody decodes"


def test_the_share_of_prompts_follows_the_pace_and_is_a_block_at_least():
    scheduler, _ = limited(0.016, num_pages=400)
    short, long = sequence(4), sequence(2000)
    scheduler.add(short)
    advance(scheduler.schedule())
    scheduler.add(long)
    seen = []
    for num_tokens, seconds in [(24, 0.010), (24, 0.010), (1, 1.0), *[(1, 1.0)] * 20]:
        chunks = scheduler.schedule()
        seen.append(of(long, chunks))
        advance(chunks)
        scheduler.prompts.note_pace(num_tokens, seconds)
    assert seen[:4] == [16, 16, 24, 16], "1000, 1420, 1714 and 1200 tokens a second"
    assert seen[-1] == BLOCK


def test_alone_a_prompt_takes_the_whole_step():
    scheduler, _ = limited(0.016)
    scheduler.add(sequence(200))
    assert [c.num_tokens for c in scheduler.schedule()] == [64]


def test_a_short_prompt_does_not_wait_for_a_long_one():
    scheduler, _ = limited(math.inf, max_step_tokens=32)
    long, short = sequence(400), sequence(30)
    scheduler.add(long)
    advance(scheduler.schedule())
    scheduler.add(short)
    num_steps = 0
    while not short.output_ids:
        chunks = scheduler.schedule()
        assert of(long, chunks) >= 8, "and the long one goes on"
        advance(chunks)
        num_steps += 1
    assert num_steps == 2


def test_a_share_of_one_block_goes_to_the_long_and_to_the_short_prompt_in_turn():
    scheduler, _ = limited(0.001)
    decoding, long, short = sequence(4), sequence(400), sequence(30)
    scheduler.add(decoding)
    advance(scheduler.schedule())
    scheduler.add(long)
    advance(scheduler.schedule())
    scheduler.add(short)
    given = []
    while not short.output_ids:
        chunks = scheduler.schedule()
        given.append((of(long, chunks), of(short, chunks)))
        advance(chunks)
    assert sorted(given) == [(0, 6), *[(0, 8)] * 3, *[(8, 0)] * (len(given) - 4)]
    assert len(given) <= 8


def test_equal_prompts_are_computed_one_after_the_other():
    scheduler, _ = limited(math.inf, max_step_tokens=32)
    first, second = sequence(64), sequence(64)
    scheduler.add(first)
    scheduler.add(second)
    advance(scheduler.schedule())
    advance(scheduler.schedule())
    assert len(first.output_ids) == 1
    assert second.num_computed_tokens == 0


def test_a_long_prompt_gets_half_however_many_short_ones_come():
    scheduler, _ = limited(math.inf, max_step_tokens=32)
    long = sequence(320)
    scheduler.add(long)
    num_steps = 0
    while not long.output_ids:
        num_steps += 1
        scheduler.add(sequence(24))
        chunks = scheduler.schedule()
        assert of(long, chunks) >= 16
        advance(chunks)
        for done in [s for s in scheduler.running if s.output_ids]:
            if done is not long:
                scheduler.remove(done)
    assert num_steps <= 20


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


def test_of_prompts_under_way_the_urgent_one_goes_first():
    scheduler, _ = limited(math.inf, max_step_tokens=32)
    plain, urgent = sequence(200), sequence(200)
    urgent.priority = -1
    scheduler.add(plain)
    advance(scheduler.schedule())
    scheduler.add(urgent)
    assert [c.sequence for c in scheduler.schedule()] == [urgent]


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


def prompted(prompt_ids, **sampling):
    one = sequence(0)
    one.prompt_ids = list(prompt_ids)
    one.prefix = PrefixKeys(one.prompt_ids, BLOCK, one.method)
    one.sampling = SamplingParams(**sampling)
    return one


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
