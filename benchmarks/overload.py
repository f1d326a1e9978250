"""Ten times the load that a server can carry: who is refused, and what whoever is accepted waits.

``python -m benchmarks.overload`` first keeps a real server with a short queue exactly full, which
gives its throughput and latencies at capacity. Then requests arrive at ten times that rate, at
random and whether or not anything is answered. Only 429 with ``Retry-After`` may refuse them.
"""

import asyncio
import random
import time
from dataclasses import dataclass, field
from typing import Any

import httpx
import typer

from benchmarks.load import RefusedError, answer, running_server
from benchmarks.report import save

app = typer.Typer()
_RUNNING = _WAITING = 8
_REQUEST: dict[str, Any] = {
    "prompt": "The old man looked at the sea and thought of the boats that had gone out.",
    "max_tokens": 24,
    "temperature": 0,
    "ignore_eos": True,
    "method": "dense",
}


@dataclass
class _Phase:
    """What became of the requests of one phase."""

    latencies_s: list[float] = field(default_factory=list)
    retry_after_s: list[int] = field(default_factory=list)
    texts: set[str] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)

    async def ask(self, client: httpx.AsyncClient) -> None:
        started_at = time.perf_counter()
        try:
            self.texts.add((await answer(client, _REQUEST))["text"])
            self.latencies_s.append(time.perf_counter() - started_at)
        except RefusedError as refusal:
            after = refusal.headers.get("retry-after", "")
            if refusal.status == 429 and after.isdecimal() and int(after) >= 1:
                self.retry_after_s.append(int(after))
            else:
                self.faults.append(f"status {refusal.status}, retry after {after!r}")
        except httpx.HTTPError as error:
            self.faults.append(f"{type(error).__name__}: {error}")

    def quantile(self, share: float) -> float:
        """Seconds within which this share of the accepted requests was answered."""
        return sorted(self.latencies_s)[int(share * (len(self.latencies_s) - 1))]


@app.command()
def measure(seconds: float = 30, factor: float = 10, *, write: bool = True) -> None:
    """Measure each phase for so many seconds."""
    options = ("--max-running-requests", str(_RUNNING), "--max-waiting-requests", str(_WAITING))
    with running_server(*options) as server:
        result = asyncio.run(_overload(server.url, seconds, factor))
    for key, value in result.items():
        print(f"{key:44s} {value:10.3f}")
    if write:
        print(f"written to {save('overload', result)}")


async def _overload(url: str, seconds: float, factor: float) -> dict[str, float]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        await _Phase().ask(client)
        full, over = _Phase(), _Phase()
        deadline = time.monotonic() + seconds
        await asyncio.gather(*(_keep(client, full, deadline) for _ in range(_RUNNING + _WAITING)))
        per_second = len(full.latencies_s) / seconds
        await _arrive(client, over, factor * per_second, seconds)
    if full.retry_after_s:
        full.faults.append("refused at capacity")
    if len(full.texts | over.texts) != 1:
        full.faults.append("answers to one request differ")
    if full.faults or over.faults:
        raise RuntimeError(f"such as {(full.faults + over.faults)[0]}")
    return {
        "capacity, requests per second": per_second,
        "p50 at capacity, s": full.quantile(0.5),
        "p99 at capacity, s": full.quantile(0.99),
        "offered load, of the capacity": factor,
        "accepted under overload, requests per second": len(over.latencies_s) / seconds,
        "refused with 429, requests per second": len(over.retry_after_s) / seconds,
        "p50 of the accepted, s": over.quantile(0.5),
        "p99 of the accepted, s": over.quantile(0.99),
        "p99 of the accepted, of that at capacity": over.quantile(0.99) / full.quantile(0.99),
        "longest Retry-After, s": max(over.retry_after_s, default=0),
    }


async def _keep(client: httpx.AsyncClient, phase: _Phase, deadline: float) -> None:
    while time.monotonic() < deadline:
        await phase.ask(client)


async def _arrive(
    client: httpx.AsyncClient, phase: _Phase, per_second: float, seconds: float
) -> None:
    """Start requests at random moments, whatever became of those before."""
    chance, at = random.Random(0), time.monotonic()  # noqa: S311 - nothing is secret here
    deadline = at + seconds
    async with asyncio.TaskGroup() as tasks:
        while (at := at + chance.expovariate(per_second)) < deadline:
            await asyncio.sleep(at - time.monotonic())
            tasks.create_task(phase.ask(client))


if __name__ == "__main__":
    app()
