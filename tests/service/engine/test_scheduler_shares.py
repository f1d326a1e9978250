"""How a step is shared among prompts, and between them and those who decode."""

import math

from tests.service.engine.scheduling import BLOCK, advance, limited, of, sequence


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


def test_of_prompts_under_way_the_urgent_one_goes_first():
    scheduler, _ = limited(math.inf, max_step_tokens=32)
    plain, urgent = sequence(200), sequence(200)
    urgent.priority = -1
    scheduler.add(plain)
    advance(scheduler.schedule())
    scheduler.add(urgent)
    assert [c.sequence for c in scheduler.schedule()] == [urgent]
