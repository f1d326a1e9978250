"""Requests that wait for their turn in a running engine: in which order, and until when."""

import asyncio
import dataclasses

import pytest

from service.errors import QueueFullError, QueueTimeoutError, UnavailableError
from tests.service.engine.driving import collect, prompt_of, request, run, wait_until


def test_a_full_queue_and_a_draining_engine_refuse(running):
    limits = {"max_running_requests": 1, "max_waiting_requests": 1}
    with running(**limits) as small:

        async def flood():
            one = request(prompt_of(10), max_tokens=300)
            async with await small.submit(one), await small.submit(one):
                with pytest.raises(QueueFullError):
                    await small.submit(one)

        asyncio.run(flood())
        wait_until(lambda: small.status().num_running == 0)
        small.drain()
        with pytest.raises(UnavailableError, match="draining"):
            run(small, request(prompt_of(5)))
        assert asyncio.run(small.wait_idle(5.0))


def test_a_queue_of_too_many_tokens_refuses_and_says_when_to_come_back(running):
    with running(max_running_requests=1, max_waiting_tokens=500) as small:

        async def flood():
            long = request(prompt_of(400), max_tokens=300)
            async with await small.submit(long) as first:
                async for _ in first:
                    break  # it runs, so the queue is empty
                async with await small.submit(request(prompt_of(600))):  # nobody else waits
                    with pytest.raises(QueueFullError, match="tokens of prompts wait") as caught:
                        await small.submit(long)
                    assert 1 <= (caught.value.retry_after_s or 0) <= 120

        asyncio.run(flood())
        wait_until(lambda: small._loop.num_waiting_tokens == 0)


def test_a_request_whose_turn_does_not_come_gets_an_error_that_says_so(running):
    with running(max_running_requests=1) as small:

        async def wait_in_vain():
            async with await small.submit(request(prompt_of(10), max_tokens=3000)) as first:
                async for _ in first:
                    break
                small.settings = small.settings.model_copy(update={"max_queue_s": 0.2})
                with pytest.raises(QueueTimeoutError, match="Retry later"):
                    await collect(small, request(prompt_of(10)))
                async with await small.submit(request(prompt_of(10))) as late:
                    with pytest.raises(QueueTimeoutError, match="Retry later"):
                        await late.has_begun()

        asyncio.run(wait_in_vain())
        wait_until(lambda: small.events.abort_reasons == ["deadline", "deadline", "client"])
        wait_until(lambda: small.status().num_pages_used == 0)


def test_asking_whether_a_generation_has_begun_takes_nothing_of_it(running):
    with running(max_queue_s=60) as one:

        async def ask():
            tokens = []
            async with await one.submit(request(prompt_of(10), max_tokens=9)) as generation:
                await generation.has_begun()
                await generation.has_begun()
                async for _, update in generation:
                    tokens += update.token_ids
            return tokens

        assert len(asyncio.run(ask())) == 9


def test_the_urgent_request_runs_before_those_that_came_earlier(running):
    with running(max_running_requests=1) as small:
        ended = []

        async def follow(name, one):
            await collect(small, one)
            ended.append(name)

        async def compete():
            busy = request(prompt_of(10), max_tokens=400)
            async with await small.submit(busy) as first:
                jobs = [
                    follow(name, dataclasses.replace(request(prompt_of(9)), priority=priority))
                    for name, priority in (("plain", 0), ("late", 5), ("urgent", -3))
                ]
                waiting = [asyncio.ensure_future(job) for job in jobs]
                await asyncio.to_thread(wait_until, lambda: small.status().num_waiting == 3)
                async for _ in first:
                    pass
                await asyncio.gather(*waiting)

        asyncio.run(compete())
        assert ended == ["urgent", "plain", "late"]
