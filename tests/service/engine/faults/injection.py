"""What breaks an engine, who is innocent of it, and how the innocent are held to their answers."""

import asyncio

from tests.service.engine.driving import collect, prompt_of, request, wait_until


class Panic(BaseException):
    """Stands in for a panic of the tokenizer's library."""


Panic.__module__ = "pyo3_runtime"


def together(engine, *requests):
    """What each request gets, an exception included, when all are there in the same step."""

    async def gather():
        # Nothing runs until all have come.
        held = engine.core._scheduler.schedule
        engine.core._scheduler.schedule = lambda **_: []
        tasks = [asyncio.ensure_future(collect(engine, one)) for one in requests]
        await asyncio.to_thread(wait_until, lambda: engine.core.num_waiting == len(requests))
        engine.core._scheduler.schedule = held
        return await asyncio.gather(*tasks, return_exceptions=True)

    return asyncio.run(gather())


def boom(*_, **__):
    raise RuntimeError("out of luck")


def raise_at(call, error):
    """A function that raises ``error`` at its ``call``-th call only."""
    state = {"calls": 0}

    def wrap(original):
        def wrapped(*args, **kwargs):
            state["calls"] += 1
            if state["calls"] == call:
                raise error
            return original(*args, **kwargs)

        return wrapped

    return wrap


def innocents():
    """Requests that leave traces in page summaries and page scores, and such that do not."""
    methods = ("dense", "quest", "snapkv", "streaming", "xattention")
    return [
        request(prompt_of(300 + 50 * index, seed=index), method, knobs_of(method), max_tokens=8)
        for index, method in enumerate(methods)
    ]


def knobs_of(method):
    return {} if method == "dense" else {"dense_below": 0}


def same(given, expected):
    assert given[0] == expected[0]
    assert given[1] == expected[1]
    assert given[2][0].statistics == expected[2][0].statistics
