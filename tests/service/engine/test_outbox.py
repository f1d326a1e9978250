"""A reader that is slow costs what its answer weighs, and loses nothing."""

import asyncio
import functools
import operator

import pytest

from service.engine.outbox import Outbox
from service.engine.sequence import Finish, FinishReason, Timing, TokenLogprob, Update
from service.errors import GenerationError
from sparse_methods.statistics import RequestStatistics


def update_of(token_id: int) -> Update:
    return Update(f"{token_id} ", (token_id,), (TokenLogprob(token_id, -1.0),))


async def take(outbox: Outbox, count: int) -> list[tuple[int, Update]]:
    taken: list[tuple[int, Update]] = []
    while len(taken) < count:
        taken += await outbox.take()
    return taken


def test_what_nobody_reads_stays_one_update_per_choice_however_much_comes():
    async def run():
        outbox = Outbox()
        for token_id in range(5000):
            for index in range(3):
                outbox.put(index, update_of(token_id))
                assert len(outbox._pending) <= 3
        return await take(outbox, 3)

    expected = Update(
        "".join(f"{t} " for t in range(5000)),
        tuple(range(5000)),
        tuple(TokenLogprob(t, -1.0) for t in range(5000)),
    )
    assert asyncio.run(run()) == [(index, expected) for index in range(3)]


@pytest.mark.parametrize("num_unread", [1, 2, 3, 10])
def test_the_end_comes_with_the_last_of_what_was_unread(num_unread):
    error = GenerationError("failed")

    async def run():
        outbox = Outbox()
        for token_id in range(num_unread - 1):
            outbox.put(0, update_of(token_id))
        outbox.put(0, Update(error=error))
        return await take(outbox, 1)

    [(_, update)] = asyncio.run(run())
    assert update.token_ids == tuple(range(num_unread - 1))
    assert update.error is error


def test_a_reader_that_keeps_up_gets_every_update_as_it_was_sent():
    async def run():
        outbox, got = Outbox(), []
        for token_id in range(4):
            sent = update_of(token_id)
            outbox.put(0, sent)
            [(_, update)] = await take(outbox, 1)
            got.append(update is sent)
        return got

    assert all(asyncio.run(run()))


def test_adding_updates_is_the_same_as_reading_them_late():
    parts = [update_of(token_id) for token_id in range(6)]

    async def run():
        outbox = Outbox()
        for part in parts:
            outbox.put(0, part)
        [(_, update)] = await take(outbox, 1)
        return update

    added = parts[0]
    for part in parts[1:]:
        added += part
    assert asyncio.run(run()) == added


GONE = GenerationError("the engine is gone")
FINISH = Finish(FinishReason.STOP, None, RequestStatistics(), Timing(0, 0, 0, 0, 0), 1, 0, 1)


@pytest.mark.parametrize("num_before", [0, 1, 3])
@pytest.mark.parametrize("end", [Update(error=GONE), Update(finish=FINISH)])
@pytest.mark.parametrize("late", [update_of(9), Update(error=GenerationError("stopped"))])
def test_an_end_stays_the_end_whatever_comes_in_after_it(num_before, end, late):
    updates = [*map(update_of, range(num_before)), end, late]

    async def run():
        outbox = Outbox()
        for update in updates:
            outbox.put(0, update)
        assert await outbox.first_error() is end.error
        return await outbox.take()

    [(_, read)] = asyncio.run(run())
    assert (read.finish, read.error) == (end.finish, end.error)
    assert read == functools.reduce(operator.add, updates)
    assert read.token_ids == (*range(num_before), *late.token_ids)
