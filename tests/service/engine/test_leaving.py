"""Generations that end before their time: left, cancelled, or too slow."""

import asyncio
import contextlib
import dataclasses

import pytest

from service.engine.sequence import FinishReason
from service.errors import QueueTimeoutError
from sparse_methods import Phase
from tests.service.engine.driving import prompt_of, request, run, wait_until


@pytest.mark.parametrize("num_prompt", [10, 3000])
def test_leaving_a_generation_frees_its_pages_at_any_moment(engine, num_prompt):
    async def leave(updates_to_read):
        one = request(prompt_of(num_prompt), max_tokens=900)
        async with await engine.submit(one) as generation:
            async for _ in generation:
                updates_to_read -= 1
                if updates_to_read < 0:
                    return

    before = len(engine.events.abort_reasons)
    asyncio.run(leave(3))

    async def leave_at_once():
        async with await engine.submit(request(prompt_of(num_prompt), max_tokens=900)):
            pass

    asyncio.run(leave_at_once())
    wait_until(lambda: len(engine.events.abort_reasons) == before + 2)
    wait_until(lambda: engine.status().num_pages_used == 0)
    assert engine.status().num_running == 0


def test_a_cancelled_generation_tells_its_reader_and_frees_its_pages(engine):
    async def cancel_after(num_updates):
        got = []
        async with await engine.submit(request(prompt_of(40), max_tokens=3000)) as generation:
            async for _, update in generation:
                got.append(update)
                if len(got) == num_updates:
                    generation.cancel()
                    generation.cancel()  # twice changes nothing
        return got

    before = len(engine.events.abort_reasons)
    got = asyncio.run(cancel_after(3))
    tokens = [token for update in got for token in update.token_ids]
    finish = got[-1].finish
    assert finish.reason is FinishReason.ABORT
    assert finish.num_generated_tokens == len(tokens) >= 3
    assert finish.statistics.phase(Phase.PREFILL).blocks_total > 0
    ((whole, text, _),) = run(engine, request(prompt_of(40), max_tokens=len(tokens)))
    assert whole[0] == tokens
    assert text[0] == "".join(update.text for update in got)
    assert engine.events.abort_reasons[before:] == ["cancelled"]
    wait_until(lambda: engine.status().num_pages_used == 0)


@pytest.mark.parametrize("limits", [({}, 0.3), ({"max_request_s": 0.3}, None)])
def test_a_generation_that_takes_too_long_ends_with_what_it_has(running, limits):
    settings, timeout_s = limits
    with running(**settings) as one:
        slow = request(prompt_of(10), max_tokens=3500)
        tokens, finish = {}, {}
        for _ in range(5):  # whoever stands still until its time is over has no token
            with contextlib.suppress(QueueTimeoutError):
                tokens, _, finish = run(one, dataclasses.replace(slow, timeout_s=timeout_s))[0]
                if tokens[0]:
                    break
        assert finish[0].reason is FinishReason.ABORT
        assert 0 < len(tokens[0]) < 3500
        assert finish[0].timing.total_s >= 0.3
        wait_until(lambda: one.status().num_pages_used == 0)
