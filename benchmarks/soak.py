"""A real server under a mixed load for minutes: every answer is compared with the one given alone.

Requests differ in route, length, method, sampling, number of choices, priority and streaming; some
clients leave in the middle, some cancel, some send what must be refused. Nothing may be lost,
doubled, leaked or answered with an error that is not meant: the queue has room for all clients, so
nobody is refused for load.
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

from benchmarks.answers import (
    CHAT,
    COMPLETIONS,
    GENERATE,
    Answer,
    Choice,
    Question,
    stream,
    streamed_answer,
    whole_answer,
)
from benchmarks.load import RefusedError, RunningServer, running_server

_NUM_CLIENTS = 12
# So few pages (128) that all are soon written to and then reclaimed from idle ones: until then the
# memory of the cache is not the process's, and looks like a leak.
_OPTIONS = ("--max-running-requests=8", "--max-step-tokens=512", "--kv-cache-bytes=67108864")
_LEAVES, _CANCELS, _IS_BAD = 0.12, 0.05, 0.1  # shares of the requests
_SHARES_PREFIX = 0.5  # of those that are compared
_WARM_UP = 0.4  # share of the time after which memory is expected to stay
_MAX_FAULTS = 20  # then it ends
_ROUTES = (GENERATE, COMPLETIONS, CHAT)
_NUM_CHOICES = 3  # of some that are sampled
_PRIORITIES = (-1, 0, 0, 1)
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
    questions: list[Question]
    deadline: float = 0.0
    expected: dict[tuple[int, int], dict[str, Any]] = field(default_factory=dict)
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    rss_bytes: list[int] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        """Whether time is up, or too much has gone wrong to go on."""
        return time.monotonic() >= self.deadline or len(self.faults) >= _MAX_FAULTS

    def compare(self, number: int, answer: Answer) -> None:
        """Compare an answer with what was said alone; only what was computed may go by the cache.

        Rows that were taken over are not counted, so the prompt's counts are compared with the
        first answer that took over as many: they may not depend on who else is there. Of several
        choices only the first tells how many it took over, so those counts are not compared.
        """
        cached = answer.usage["prompt_tokens_details"]["cached_tokens"]
        is_one = len(answer.choices) == 1
        seen = {
            "choices": answer.choices,
            "usage": {n: answer.usage[n] for n in ("prompt_tokens", "completion_tokens")},
            "decode": answer.sparsity["decode"],
            "prefill": answer.sparsity["prefill"] if is_one else None,
        }
        alone = self.expected.get((number, 0), seen)
        expected = self.expected.setdefault((number, cached), {**alone, "prefill": seen["prefill"]})
        self.outcomes["tokens compared"] += answer.usage["completion_tokens"]
        self.outcomes["answers with cached tokens"] += cached > 0
        if seen != expected:
            different = {n: (seen[n], expected[n]) for n in seen if seen[n] != expected[n]}
            self.faults.append(f"{self.describe(number)}, {cached} cached: {different}")

    def describe(self, number: int) -> str:
        """A request, for a message."""
        question = self.questions[number]
        return f"request {number} ({question.fields['method']}, {question.path})"


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
        run = _Soak(client, server, _questions(seed))
        for number, question in enumerate(run.questions):
            run.compare(number, await whole_answer(client, _unshared(question)))
        run.deadline = time.monotonic() + seconds
        clients = [_client(run, random.Random(seed + 1 + n)) for n in range(_NUM_CLIENTS)]  # noqa: S311 - nothing is secret
        await asyncio.gather(_watch(run), *clients)
        await _check_idle(run)
    return run


def _questions(seed: int) -> list[Question]:
    """The requests that repeat, each of another length: every method on every route, twice."""
    generator, questions = random.Random(seed), []  # noqa: S311 - nothing is secret here
    for number, method in enumerate(_METHODS * 2 * len(_ROUTES)):
        turn = number // len(_METHODS)
        start = generator.randrange(len(_TEXT))
        length = generator.choice((3, 40, 300, 2500))
        fields: dict[str, Any] = {
            "prompt": (_TEXT * (length // len(_TEXT) + 2))[start : start + length],
            "max_tokens": generator.randint(1, 40),
            "temperature": 0,
            **method,
        }
        if (number + turn) % 2:
            num_choices = 1 if turn < len(_ROUTES) else _NUM_CHOICES
            fields |= {"temperature": 0.9, "seed": number, "n": num_choices}
        questions.append(Question(_ROUTES[turn % len(_ROUTES)], fields))
    return questions


def _unshared(question: Question) -> Question:
    """The same with a salt of its own: all of its prompt is computed."""
    return question.with_fields(cache_salt=secrets.token_hex(8))


async def _client(run: _Soak, chance: random.Random) -> None:
    """Ask again and again; whatever differs from what must be is a fault."""
    while not run.is_over:
        number = chance.randrange(len(run.questions))
        question = run.questions[number].with_fields(priority=chance.choice(_PRIORITIES))
        if chance.random() >= _SHARES_PREFIX:
            question = _unshared(question)
        try:
            kind = chance.random()
            if kind < _IS_BAD:
                await _ask_badly(run, chance)
            elif kind < _IS_BAD + _LEAVES:
                await _leave(run, question, chance)
            elif kind < _IS_BAD + _LEAVES + _CANCELS:
                await _cancel(run, question, number)
            else:
                ask = whole_answer if chance.random() < 0.5 else streamed_answer
                run.compare(number, await ask(run.client, question))
                run.outcomes["answered"] += 1
        except RefusedError as refusal:
            run.faults.append(f"status {refusal.status}: {refusal.text}")
        except httpx.HTTPError as error:
            run.faults.append(f"{type(error).__name__}: {error}")


async def _leave(run: _Soak, question: Question, chance: random.Random) -> None:
    """Read some events, or nothing for a moment, then close the connection."""
    if chance.random() < 0.5:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(chance.uniform(0, 0.3)):
                await whole_answer(run.client, question)
    else:
        num_read = chance.randrange(4)
        async with stream(run.client, question) as events:
            while num_read and await anext(events, None) is not None:
                num_read -= 1
    run.outcomes["left"] += 1


async def _cancel(run: _Soak, question: Question, number: int) -> None:
    """End a stream by its id after its first event: its choices must begin as they do alone."""
    name, answer, is_cancelled = secrets.token_hex(16), Answer(), False
    async with stream(run.client, question, {"X-Request-Id": name}) as events:
        async for event in events:
            if not is_cancelled:
                await run.client.post(f"/requests/{name}/cancel")  # 404 if it has just ended
                is_cancelled = True
            answer.add(event)
    run.outcomes["cancelled"] += any(c.finish_reason == "abort" for c in answer.choices.values())
    alone = run.expected[number, 0]["choices"]
    if not all(_begins(choice, alone[index]) for index, choice in answer.choices.items()):
        run.faults.append(f"{run.describe(number)}, cancelled: {answer.choices}, alone {alone}")


def _begins(choice: Choice, alone: Choice) -> bool:
    """Whether a choice has ended, and is what the one given alone begins with."""
    has_ended = choice.finish_reason is not None
    same_ids = choice.token_ids == alone.token_ids[: len(choice.token_ids)]
    return has_ended and same_ids and alone.text.startswith(choice.text)


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
