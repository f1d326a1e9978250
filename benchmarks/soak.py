"""A real server under a mixed load for minutes: every answer is compared with the one given alone.

Requests differ in length, method, sampling and streaming; some clients leave in the middle, some
cancel, some send what must be refused. Nothing may be lost, doubled, leaked or answered with an
error that is not meant: the queue has room for all clients, so nobody is refused for load.
"""

import asyncio
import contextlib
import random
import secrets
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.load import (
    RefusedError,
    RunningServer,
    answer,
    events_of,
    running_server,
    stream,
    streamed_answer,
)

_NUM_CLIENTS = 12
# So few pages (128) that all are soon written to and then reclaimed from idle ones: until then the
# memory of the cache is not the process's, and looks like a leak.
_OPTIONS = ("--max-running-requests=8", "--max-step-tokens=512", "--kv-cache-bytes=67108864")
_LEAVES, _CANCELS, _IS_BAD = 0.12, 0.05, 0.1  # shares of the requests
_SHARES_PREFIX = 0.5  # of those that are compared
_WARM_UP = 0.4  # share of the time after which memory is expected to stay
_MAX_FAULTS = 20  # then it ends
_TEXT = "The old man looked at the sea and thought of the boats that had gone out before dawn. "
_METHODS: tuple[dict[str, Any], ...] = (
    {"method": "dense"},
    {"method": "flash_skip_softmax", "version": "v1"},
    {"method": "flash_skip_softmax"},
    {"method": "streaming"},
    {"method": "quest", "method_params": {"budget_pages": 2, "dense_below": 0}},
    {"method": "block_topk", "method_params": {"keep_ratio": 0.3, "dense_below": 0}},
)
_BAD: tuple[tuple[dict[str, Any], int], ...] = (
    ({"prompt": ""}, 400),
    ({"prompt": "x", "max_tokens": 0}, 400),
    ({"prompt": "x", "method": "none such"}, 400),
    ({"prompt": "x", "method": "streaming", "method_params": {"unknown": 1}}, 400),
    ({"prompt": "x" * 400_000}, 400),
    ({"prompt_token_ids": [10**9]}, 400),
    ({"prompt": "x", "surprise": True}, 400),
)


@dataclass
class _Soak:
    """One run and what happened in it so far.

    Attributes:
        expected: What was answered alone, by request, and first of all with so many cached tokens.
    """

    client: httpx.AsyncClient
    server: RunningServer
    requests: list[dict[str, Any]]
    deadline: float = 0.0
    expected: dict[tuple[int, int], dict[str, Any]] = field(default_factory=dict)
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    rss_bytes: list[int] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        """Whether time is up, or too much has gone wrong to go on."""
        return time.monotonic() >= self.deadline or len(self.faults) >= _MAX_FAULTS

    def compare(self, number: int, given: dict[str, Any]) -> None:
        """Compare an answer with what was said alone; only what was computed may go by the cache.

        Rows that were taken over are not counted, so the prompt's counts are compared with the
        first answer that took over as many: they may not depend on who else is there.
        """
        cached = given["usage"]["prompt_tokens_details"]["cached_tokens"]
        seen = {
            "text": given["text"],
            "token_ids": given["token_ids"],
            "finish_reason": given["choices"][0]["finish_reason"]
            if "choices" in given
            else given["finish_reason"],
            "usage": {n: given["usage"][n] for n in ("prompt_tokens", "completion_tokens")},
            "decode": given["sparsity"]["decode"],
            "prefill": given["sparsity"]["prefill"],
        }
        alone = self.expected.get((number, 0), seen)
        expected = self.expected.setdefault((number, cached), {**alone, "prefill": seen["prefill"]})
        self.outcomes["tokens compared"] += len(given["token_ids"])
        self.outcomes["answers with cached tokens"] += cached > 0
        if seen != expected:
            different = {n: (seen[n], expected[n]) for n in seen if seen[n] != expected[n]}
            method = self.requests[number]["method"]
            self.faults.append(f"request {number} ({method}), {cached} cached: {different}")


def soak(seconds: float, seed: int = 0) -> dict[str, float]:
    """Start a server, load it, and check it.

    Returns:
        How many requests ended how, tokens compared, and growth of memory after warming up.

    Raises:
        RuntimeError: Something that must hold did not; the message says what.
    """
    with running_server(*_OPTIONS) as server:
        run = asyncio.run(_load(server, seconds, seed))
    if run.faults:
        raise RuntimeError(f"{len(run.faults)} faults, such as {run.faults[0]}")
    return {
        **{name: float(count) for name, count in sorted(run.outcomes.items())},
        "seconds": seconds,
        "RSS after warming up, MiB": _median_after(run.rss_bytes, _WARM_UP) / 2**20,
        "RSS growth": growth(run.rss_bytes),
    }


async def _load(server: RunningServer, seconds: float, seed: int) -> _Soak:
    limits = httpx.Limits(max_connections=4 * _NUM_CLIENTS)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
        run = _Soak(client, server, _requests(seed))
        for number, request in enumerate(run.requests):
            run.compare(number, await answer(client, _unshared(request)))
        run.deadline = time.monotonic() + seconds
        clients = [_client(run, random.Random(seed + 1 + n)) for n in range(_NUM_CLIENTS)]  # noqa: S311 - nothing is secret
        await asyncio.gather(_watch(run), *clients)
        await _check_idle(run)
    return run


def _requests(seed: int) -> list[dict[str, Any]]:
    """The requests that repeat, each of another length."""
    generator, requests = random.Random(seed), []  # noqa: S311 - nothing is secret here
    for number, method in enumerate(_METHODS * 4):
        start = generator.randrange(len(_TEXT))
        length = generator.choice((3, 40, 300, 2500))
        prompt = (_TEXT * (length // len(_TEXT) + 2))[start : start + length]
        sampling = {"temperature": 0} if number % 2 else {"temperature": 0.9, "seed": number}
        max_tokens = generator.randint(1, 40)
        requests.append({"prompt": prompt, "max_tokens": max_tokens, **sampling, **method})
    return requests


def _unshared(request: dict[str, Any]) -> dict[str, Any]:
    """The same with a salt of its own: all of its prompt is computed."""
    return {**request, "cache_salt": secrets.token_hex(8)}


async def _client(run: _Soak, chance: random.Random) -> None:
    """Ask again and again; whatever differs from what must be is a fault."""
    while not run.is_over:
        number = chance.randrange(len(run.requests))
        request = run.requests[number]
        if chance.random() >= _SHARES_PREFIX:
            request = _unshared(request)
        try:
            kind = chance.random()
            if kind < _IS_BAD:
                await _ask_badly(run, chance)
            elif kind < _IS_BAD + _LEAVES:
                await _leave(run, request, chance)
            elif kind < _IS_BAD + _LEAVES + _CANCELS:
                await _cancel(run, request, number)
            else:
                ask = answer if chance.random() < 0.5 else streamed_answer
                run.compare(number, await ask(run.client, request))
                run.outcomes["answered"] += 1
        except RefusedError as refusal:
            run.faults.append(f"status {refusal.status}: {refusal.text}")
        except httpx.HTTPError as error:
            run.faults.append(f"{type(error).__name__}: {error}")


async def _leave(run: _Soak, request: dict[str, Any], chance: random.Random) -> None:
    """Read some events, or nothing for a moment, then close the connection."""
    if chance.random() < 0.5:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(chance.uniform(0, 0.3)):
                await answer(run.client, request)
    else:
        num_read = chance.randrange(4)
        async with stream(run.client, request) as events:
            while num_read and await anext(events, None) is not None:
                num_read -= 1
    run.outcomes["left"] += 1


async def _cancel(run: _Soak, request: dict[str, Any], number: int) -> None:
    """End a stream by its id after its first event: its tokens must begin as they do alone."""
    name, reason = secrets.token_hex(16), None
    token_ids: list[int] = []
    body = {**request, "stream": True}
    headers = {"X-Request-Id": name}
    async with run.client.stream("POST", "/generate", json=body, headers=headers) as response:
        if response.status_code != 200:
            text = (await response.aread()).decode()
            raise RefusedError(response.status_code, text)
        async for event in events_of(response):
            if not token_ids:
                await run.client.post(f"/requests/{name}/cancel")  # 404 if it has just ended
            token_ids += event["token_ids"]
            reason = event.get("finish_reason")
    run.outcomes["cancelled"] += reason == "abort"
    alone = run.expected[number, 0]["token_ids"]
    if reason is None or token_ids != alone[: len(token_ids)]:
        run.faults.append(f"request {number}, cancelled: {token_ids} ({reason}), alone {alone}")


async def _ask_badly(run: _Soak, chance: random.Random) -> None:
    body, expected = chance.choice(_BAD)
    response = await run.client.post("/generate", json=body)
    run.outcomes["refused"] += 1
    if response.status_code != expected:
        name = str(body)[:80]
        run.faults.append(f"{name} was answered {response.status_code}, not {expected}")


async def _watch(run: _Soak) -> None:
    """Look at the server's memory ten times a second."""
    while not run.is_over:
        run.rss_bytes.append(run.server.resident_bytes)
        await asyncio.sleep(0.1)


def growth(rss_bytes: list[int]) -> float:
    """Median of the last tenth over that of the tenth after warming up, less one."""
    return _median_after(rss_bytes, 0.9) / _median_after(rss_bytes, _WARM_UP) - 1


def _median_after(rss_bytes: list[int], share: float) -> int:
    tenth, start = max(1, len(rss_bytes) // 10), int(len(rss_bytes) * share)
    part = sorted(rss_bytes[start : start + tenth])
    return part[len(part) // 2]


async def _check_idle(run: _Soak) -> None:
    """Nobody runs any more, so nobody may own a page; and nothing failed unnoticed."""
    wanted = dict.fromkeys(("running_requests", "waiting_requests", "kv_cache_pages_used"), 0.0)
    values: dict[str, str] = {}
    seen: dict[str, float] = {}
    for _ in range(100):
        lines = (await run.client.get("/metrics")).text.splitlines()
        values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        seen = {name: float(values[f"sparseserve_{name}"]) for name in wanted}
        if seen == wanted:
            break
        await asyncio.sleep(0.1)
    else:
        run.faults.append(f"an idle server reports {seen}")
    errors = [n for n, v in values.items() if "engine_errors_total" in n and float(v)]
    is_ours = 'http_requests_total{code="5'  # probes are told 503 while the model loads
    errors += [n for n in values if is_ours in n and "/health" not in n]
    if errors:
        run.faults.append(f"the server counted {errors}")
