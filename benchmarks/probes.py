"""How long probes take while the engine runs as many streams as it may.

``python -m benchmarks.probes`` serves the built-in model, lets a process of its own keep every
place of the engine taken and as many more requests waiting, and asks for both health routes.
All of it shares this machine, so its own latency without load is measured in the same run.
"""

import asyncio
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import typer

from benchmarks.answers import GENERATE, Question, streamed_answer
from benchmarks.load import RunningServer, running_server
from benchmarks.report import save

app = typer.Typer()
_ROUTES = ("/health/live", "/health/ready")
_PAUSE_S = 0.02
_WARM_UP_S = 5.0
_QUESTION = Question(
    GENERATE,
    {"prompt": "The old man looked at the sea and thought of " * 8, "ignore_eos": True},
)


@app.command()
def measure(streams: int = 64, seconds: float = 30, *, write: bool = True) -> None:
    """Measure idle, then under load, for so many seconds each."""
    with running_server(f"--max-running-requests={streams}") as server:
        idle = _probe(server, seconds)
        with _load(server, 2 * streams):
            time.sleep(_WARM_UP_S)
            loaded = _probe(server, seconds)
    result = {
        f"{name} {state}, ms": value * 1e3
        for state, taken in (("idle", idle), ("under load", loaded))
        for name, value in _summary(taken).items()
    }
    result |= {"streams": streams, "probes under load": len(loaded)}
    for key, value in result.items():
        print(f"{key:24s} {value:10.3f}")
    if write:
        print(f"written to {save('probes', result)}")


def _probe(server: RunningServer, seconds: float) -> list[float]:
    """Seconds that each probe took."""
    deadline, taken = time.monotonic() + seconds, []
    with httpx.Client(base_url=server.url) as client:
        while time.monotonic() < deadline:
            for route in _ROUTES:
                started_at = time.perf_counter()
                client.get(route).raise_for_status()
                taken.append(time.perf_counter() - started_at)
                time.sleep(_PAUSE_S)
    return taken


def _summary(taken: list[float]) -> dict[str, float]:
    quantiles = statistics.quantiles(taken, n=100)
    return {"p50": quantiles[49], "p99": quantiles[98], "max": max(taken)}


@contextmanager
def _load(server: RunningServer, clients: int) -> Iterator[None]:
    """Keep so many clients asking, in another process."""
    process = multiprocessing.get_context("spawn").Process(
        target=_ask_forever, args=(server.url, clients), daemon=True
    )
    process.start()
    try:
        yield
        if not process.is_alive():
            raise RuntimeError("the clients gave up, so nothing was under load")
    finally:
        process.terminate()
        process.join()


def _ask_forever(url: str, clients: int) -> None:
    async def one(client: httpx.AsyncClient) -> None:
        while True:
            await streamed_answer(client, _QUESTION)

    async def everyone() -> None:
        limits = httpx.Limits(max_connections=clients)
        async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
            await asyncio.gather(*(one(client) for _ in range(clients)))

    asyncio.run(everyone())


if __name__ == "__main__":
    app()
