"""What HTTP costs on top of the engine, and whether the server endures load.

``python -m benchmarks.server measure`` runs the same streams twice through one engine: by its own
``submit``, and over HTTP with a client in another process; rounds alternate and the median counts.
``--llama`` takes random weights in the shape of Llama 3.1 8B on a GPU instead of the built-in
model. ``--soak MINUTES`` runs ``benchmarks/soak.py`` instead.
"""

import asyncio
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from benchmarks.http import read_streams
from benchmarks.report import save
from benchmarks.soak import soak
from service.engine.engine import Engine
from service.engine.events import EngineEvents
from service.engine.generation import GenerationRequest
from service.engine.sequence import SamplingParams
from service.main import create_app
from service.models.loading import load_model
from service.server import Server
from service.settings import Settings
from sparse_methods import get_sparse_method

app = typer.Typer()


@app.command()
def measure(  # noqa: PLR0913 - each is an option of the command line
    streams: int = 32,
    prompt_tokens: int = 512,
    tokens: int = 128,
    rounds: int = 5,
    *,
    llama: bool = False,
    soak_minutes: Annotated[float, typer.Option("--soak")] = 0.0,
    write: bool = True,
) -> None:
    """Compare, or soak."""
    if soak_minutes:
        result = soak(soak_minutes * 60)
    else:
        result = overhead(streams, prompt_tokens, tokens, rounds, llama=llama)
    for key, value in result.items():
        print(f"{key:40s} {value:12.3f}")
    if write:
        name = "soak" if soak_minutes else f"server{'-llama' if llama else ''}"
        print(f"written to {save(name, result)}")


@app.command(hidden=True)
def read(port: int, streams: int, prompt_tokens: int, tokens: int) -> None:
    """Read streams until standard input ends: one round per line, which takes so many seconds."""
    for _ in sys.stdin:
        started_at = time.perf_counter()
        asyncio.run(read_streams(port, streams, tokens, _prompt(prompt_tokens)))
        print(time.perf_counter() - started_at, flush=True)


def overhead(
    streams: int, prompt_tokens: int, tokens: int, rounds: int, *, llama: bool
) -> dict[str, float]:
    """Tokens per second by the engine and over HTTP, and what the second lacks of the first."""
    settings = Settings(
        port=0, method="dense", max_running_requests=max(64, streams), max_waiting_requests=streams
    )
    arguments = (streams, prompt_tokens, tokens)
    with (
        _running(settings, llama=llama) as (engine, port),
        _reader(port, *arguments) as ask,
    ):
        by_engine, over_http = [], []
        for number in range(rounds + 1):
            seconds = [asyncio.run(_submit_all(engine, *arguments)), ask()]
            if number:  # before that caches are filled and graphs captured
                by_engine.append(seconds[0])
                over_http.append(seconds[1])
    total = streams * tokens
    rates = [total / statistics.median(seconds) for seconds in (by_engine, over_http)]
    return {
        "share of throughput that HTTP costs": 1 - rates[1] / rates[0],
        "tokens per second, engine": rates[0],
        "tokens per second, HTTP": rates[1],
        "streams": streams,
        "prompt tokens": prompt_tokens,
        "tokens per stream": tokens,
    }


@contextmanager
def _running(settings: Settings, *, llama: bool) -> Iterator[tuple[Engine, int]]:
    """An engine and the port where a server in this process offers it."""
    engines: list[Engine] = []
    addresses: list[str] = []

    def load(events: EngineEvents) -> Engine:
        if llama:
            from benchmarks.llama import build_model

            loaded = build_model()
        else:
            loaded = load_model(None, "auto", "auto")
        engines.append(Engine(settings, loaded, events))
        return engines[0]

    server = Server(settings, create_app(settings, load), addresses.append)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not addresses:
            if not thread.is_alive():
                raise RuntimeError("the server ended before it was ready")
            time.sleep(0.05)
        yield engines[0], int(addresses[0].rsplit(":", 1)[1])
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def _reader(*arguments: int) -> Iterator[Callable[[], float]]:
    """Ask for a round and get its seconds: from a process of its own, as clients have one."""
    with subprocess.Popen(  # noqa: S603 - this very module
        [sys.executable, "-m", "benchmarks.server", "read", *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:

        def ask() -> float:
            print(file=process.stdin, flush=True)
            return float((process.stdout or sys.stdin).readline())

        try:
            yield ask
        finally:
            process.kill()


async def _submit_all(engine: Engine, streams: int, prompt_tokens: int, tokens: int) -> float:
    """Seconds until every stream has ended."""
    method = get_sparse_method("dense")()
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)

    async def one(number: int) -> None:
        request = GenerationRequest(
            str(number), method, sampling, prompt_ids=_prompt(prompt_tokens)
        )
        async with await engine.submit(request) as generation:
            async for _ in generation:
                pass

    started_at = time.perf_counter()
    await asyncio.gather(*(one(number) for number in range(streams)))
    return time.perf_counter() - started_at


def _prompt(num_tokens: int) -> list[int]:
    return [8 + 37 * place % 4000 for place in range(num_tokens)]


if __name__ == "__main__":
    app()
