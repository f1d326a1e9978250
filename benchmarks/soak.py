"""A real server under a mixed load for minutes: every answer is compared with the one given alone.

Requests differ in length, method, sampling and streaming; some clients leave in the middle, some
send what must be refused. Nothing may be lost, doubled, leaked or answered with a 5xx but the 503s
that are meant.
"""

import asyncio
import contextlib
import os
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import orjson

_NUM_CLIENTS = 12
_LEAVES, _IS_BAD = 0.15, 0.1  # shares of the requests
_WARM_UP = 0.3  # share of the time after which memory is expected to stay
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
class _Tally:
    """What happened so far."""

    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    rss_bytes: list[int] = field(default_factory=list)


def soak(seconds: float, seed: int = 0) -> dict[str, float]:
    """Start a server, load it, and check it.

    Returns:
        How many requests ended how, tokens compared, and growth of memory after warming up.

    Raises:
        RuntimeError: Something that must hold did not; the message says what.
    """
    with _server() as (pid, port):
        tally = asyncio.run(_load(port, pid, seconds, seed))
    growth = _growth(tally.rss_bytes)
    if tally.faults:
        raise RuntimeError(f"{len(tally.faults)} faults, such as {tally.faults[0]}")
    return {**{name: float(count) for name, count in tally.outcomes.items()}, "RSS growth": growth}


@contextmanager
def _server() -> Iterator[tuple[int, int]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "service.cli", "serve", "--port", str(port)]
    options = ["--max-running-requests", "8", "--max-step-tokens", "512"]
    with subprocess.Popen(  # noqa: S603 - our own server
        [*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            _wait_ready(process, port)
            yield process.pid, port
        finally:
            process.terminate()


def _wait_ready(process: subprocess.Popen[bytes], port: int) -> None:
    while process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"http://127.0.0.1:{port}/health/ready").status_code == 200:
                return
        time.sleep(0.1)
    raise RuntimeError("the server ended before it was ready")


async def _load(port: int, pid: int, seconds: float, seed: int) -> _Tally:
    tally, requests = _Tally(), _requests(seed)
    limits = httpx.Limits(max_connections=4 * _NUM_CLIENTS)
    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{port}", timeout=120, limits=limits
    ) as client:
        alone = [await _answer(client, request) for request in requests]
        deadline = time.monotonic() + seconds
        clients = [
            _client(client, requests, alone, tally, deadline, random.Random(seed + 1 + number))  # noqa: S311
            for number in range(_NUM_CLIENTS)
        ]
        await asyncio.gather(_watch(pid, tally, deadline), *clients)
        await _check_idle(client, tally)
    return tally


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


async def _client(
    client: httpx.AsyncClient,
    requests: list[dict[str, Any]],
    alone: list[dict[str, Any]],
    tally: _Tally,
    deadline: float,
    chance: random.Random,
) -> None:
    """Ask again and again; whatever differs from what must be is a fault."""
    while time.monotonic() < deadline:
        try:
            if chance.random() < _IS_BAD:
                await _ask_badly(client, tally, chance)
                continue
            number = chance.randrange(len(requests))
            if chance.random() < _LEAVES:
                await _leave(client, requests[number], tally, chance)
                continue
            ask = _answer if chance.random() < 0.5 else _streamed_answer
            answer = await ask(client, requests[number])
        except _RefusedError as refusal:
            tally.outcomes[f"answered {refusal.status}"] += 1
            if refusal.status not in (429, 503):
                tally.faults.append(f"status {refusal.status}: {refusal.text}")
            continue
        except httpx.HTTPError as error:
            tally.faults.append(f"{type(error).__name__}: {error}")
            continue
        tally.outcomes["answered"] += 1
        tally.outcomes["tokens compared"] += len(answer["token_ids"])
        if answer != alone[number]:
            tally.faults.append(f"{requests[number]}: {answer}, alone {alone[number]}")


class _RefusedError(Exception):
    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status, self.text = status, text


async def _answer(client: httpx.AsyncClient, request: dict[str, Any]) -> dict[str, Any]:
    response = await client.post("/generate", json=request)
    if response.status_code != 200:
        raise _RefusedError(response.status_code, response.text)
    answer = response.json()
    return _comparable(answer, answer["text"], answer["choices"][0]["token_ids"])


async def _streamed_answer(client: httpx.AsyncClient, request: dict[str, Any]) -> dict[str, Any]:
    texts, token_ids, last = [], [], {}
    async with _stream(client, request) as events:
        async for event in events:
            if "error" in event:
                raise _RefusedError(event["error"]["code"], str(event))
            texts.append(event["text"])
            token_ids += event["token_ids"]
            last = event
    return _comparable(last, "".join(texts), token_ids)


def _comparable(answer: dict[str, Any], text: str, token_ids: list[int]) -> dict[str, Any]:
    """What may not depend on who else is there; a reused prefix changes what was computed."""
    usage = answer["usage"]
    is_whole = usage["prompt_tokens_details"]["cached_tokens"] == 0
    return {
        "text": text,
        "token_ids": token_ids,
        "usage": {name: usage[name] for name in ("prompt_tokens", "completion_tokens")},
        "prefill": answer["sparsity"]["prefill"] if is_whole else None,
        "decode": answer["sparsity"]["decode"],
    }


async def _leave(
    client: httpx.AsyncClient, request: dict[str, Any], tally: _Tally, chance: random.Random
) -> None:
    """Read some events, then close the connection."""
    num_read = chance.randrange(4)
    async with _stream(client, request) as events:
        while num_read and await anext(events, None) is not None:
            num_read -= 1
    tally.outcomes["left"] += 1


@asynccontextmanager
async def _stream(
    client: httpx.AsyncClient, request: dict[str, Any]
) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
    async with client.stream("POST", "/generate", json={**request, "stream": True}) as response:
        if response.status_code != 200:
            raise _RefusedError(response.status_code, (await response.aread()).decode())
        yield _events(response)


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        if line.startswith("data: {"):
            yield orjson.loads(line[6:])


async def _ask_badly(client: httpx.AsyncClient, tally: _Tally, chance: random.Random) -> None:
    body, expected = chance.choice(_BAD)
    response = await client.post("/generate", json=body)
    tally.outcomes["refused"] += 1
    if response.status_code != expected:
        name = str(body)[:80]
        tally.faults.append(f"{name} was answered {response.status_code}, not {expected}")


async def _watch(pid: int, tally: _Tally, deadline: float) -> None:
    """Look at the server's memory ten times a second."""
    while time.monotonic() < deadline:
        tally.rss_bytes.append(_resident_bytes(pid))
        await asyncio.sleep(0.1)


def _resident_bytes(pid: int) -> int:
    pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _growth(rss_bytes: list[int]) -> float:
    """Median of the last tenth over that of the tenth after warming up, less one."""
    tenth, start = max(1, len(rss_bytes) // 10), int(len(rss_bytes) * _WARM_UP)
    early = sorted(rss_bytes[start : start + tenth])
    late = sorted(rss_bytes[-tenth:])
    return late[len(late) // 2] / early[len(early) // 2] - 1


async def _check_idle(client: httpx.AsyncClient, tally: _Tally) -> None:
    """Nobody runs any more, so nobody may own a page."""
    wanted = dict.fromkeys(("running_requests", "waiting_requests", "kv_cache_pages_used"), 0.0)
    seen: dict[str, float] = {}
    for _ in range(100):
        lines = (await client.get("/metrics")).text.splitlines()
        values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        seen = {name: float(values[f"sparseserve_{name}"]) for name in wanted}
        if seen == wanted:
            return
        await asyncio.sleep(0.1)
    tally.faults.append(f"an idle server reports {seen}")
