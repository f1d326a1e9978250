"""Engines on the tiny model in their own threads: starting them, asking them, and reading them."""

import asyncio
import contextlib
import time

import torch

from service.engine.engine import Engine
from service.engine.events import NoEvents
from service.engine.generation import GenerationRequest
from service.engine.sequence import SamplingParams
from service.settings import Settings
from sparse_methods import get_sparse_method

METHODS = [
    ("dense", {}),
    ("streaming", {"window_blocks": 1}),
    ("flash_skip_softmax", {"prefill_threshold": 0.3, "decode_threshold": 0.3}),
]


class Counting(NoEvents):
    def __init__(self):
        self.num_preempted = 0
        self.kinds = []
        self.abort_reasons = []

    def preempted(self):
        self.num_preempted += 1

    def engine_error(self, kind):
        self.kinds.append(kind)

    def aborted(self, reason):
        self.abort_reasons.append(reason)


@contextlib.contextmanager
def running_engine(directory, **settings):
    settings = {
        "device": "cpu",
        "method": "dense",
        "max_running_requests": 8,
        "prefix_caching": False,  # what is reused counts nowhere: test_prefix_reuse.py
        **settings,
    }
    engine = Engine.load(Settings(model=directory, **settings), Counting())
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


def prompt_of(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(8, 4096, (length,), generator=generator).tolist()


def request(prompt_ids, method="dense", knobs=None, *, n=1, **sampling):
    sampling = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True, **sampling}
    return GenerationRequest(
        request_id="r",
        method=get_sparse_method(method)(knobs),
        sampling=SamplingParams(**sampling),
        prompt_ids=prompt_ids,
        n=n,
    )


async def collect(engine, one):
    tokens, text, finishes = {}, {}, {}
    async with await engine.submit(one) as generation:
        async for index, update in generation:
            tokens.setdefault(index, []).extend(update.token_ids)
            text[index] = text.get(index, "") + update.text
            if update.finish is not None:
                finishes[index] = update.finish
    return tokens, text, finishes


def run(engine, *requests):
    async def gather():
        return await asyncio.gather(*(collect(engine, one) for one in requests))

    return asyncio.run(gather())


def wait_until(condition, timeout_s=20):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
