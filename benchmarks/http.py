"""Server CPU per streamed token: the whole HTTP layer and engine thread around a core that is told.

``python -m benchmarks.http measure`` starts a server in a process of its own, whose engine core
makes up one token per stream and step at a given pace, and reads all streams through plain sockets.
CPU time is that of the server process, its engine thread included; steps are slow enough that every
token is an event of its own, which the result shows. A slow pace costs more per token: the reader
and the server's threads sleep between two steps, and waking them is paid for by whoever sends.
"""

import asyncio
import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
import typer
from typing_extensions import override

from benchmarks.report import save
from service.engine.core import EngineCore
from service.engine.engine import Engine
from service.engine.events import EngineEvents
from service.engine.model_runner import ModelRunner
from service.engine.sequence import FinishReason, Update
from service.engine.sequence import Sequence as Generated
from service.main import create_app
from service.models.loading import load_model
from service.server import Server
from service.settings import Settings

app = typer.Typer()
_WORD, _TOKEN = " word", 7
_PACES = [150.0, 400.0, 800.0]


@app.command()
def measure(
    streams: int = 64,
    tokens: int = 2000,
    rounds: int = 5,
    steps_per_second: list[float] = _PACES,
    *,
    write: bool = True,
) -> None:
    """Measure the median of some rounds at each pace."""
    results = []
    for pace in steps_per_second:
        result = {"steps_per_second": pace, **_at_pace(pace, streams, tokens, rounds)}
        results.append(result)
        for key, value in result.items():
            print(f"{key:24s} {value:10.3f}")
    if write:
        setting = {"streams": streams, "tokens_per_stream": tokens, "rounds": rounds}
        print(f"written to {save('http', {**setting, 'paces': results})}")


def _at_pace(pace: float, streams: int, tokens: int, rounds: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.http", "serve", str(streams), str(pace)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:  # noqa: S603 - this very module
        try:
            port = int((server.stdout or sys.stdin).readline().rsplit(":", 1)[1])
            asyncio.run(read_streams(port, streams, 20))  # a first round fills caches
            measured = [_round(server.pid, port, streams, tokens) for _ in range(rounds)]
        finally:
            server.terminate()
    result = sorted(measured, key=lambda one: one["cpu_us_per_token"])[rounds // 2]
    # Whoever shares the machine makes rounds dearer, never cheaper.
    return {**result, "lowest_cpu_us": min(one["cpu_us_per_token"] for one in measured)}


@app.command()
def serve(streams: int, steps_per_second: float) -> None:
    """Serve the scripted engine and print its address; used by ``measure``."""
    settings = Settings(
        port=0, method="dense", device="cpu", max_running_requests=streams, kv_cache_bytes=2**28
    )
    logging.basicConfig(level="WARNING")

    def load(events: EngineEvents) -> Engine:
        engine = _ScriptedEngine(settings, load_model(None, "cpu", "float32"), events)
        engine.core.interval_s = 1 / steps_per_second
        return engine

    def announce(address: str) -> None:
        print(address, flush=True)

    Server(settings, create_app(settings, load), announce).run()


class _ScriptedCore(EngineCore):
    """Gives every sequence the same token at a steady pace; no model runs."""

    interval_s = 0.01
    _next_at = 0.0

    @override
    def step(self) -> dict[Generated, Update]:
        now = time.monotonic()
        time.sleep(max(0.0, self._next_at - now))
        self._next_at = max(now, self._next_at) + self.interval_s
        updates: dict[Generated, Update] = {}
        for sequence in list(self._live):
            sequence.output_ids.append(_TOKEN)
            is_last = len(sequence.output_ids) >= sequence.sampling.max_tokens
            finish = self._finish(sequence, FinishReason.LENGTH, None) if is_last else None
            updates[sequence] = Update(_WORD, (_TOKEN,), (), finish)
        return updates


class _ScriptedEngine(Engine):
    core: _ScriptedCore

    @override
    def _build_core(self, runner: ModelRunner) -> EngineCore:
        core = super()._build_core(runner)
        core.__class__ = _ScriptedCore  # everything else of it stays real
        return core


def _round(pid: int, port: int, streams: int, tokens: int) -> dict[str, float]:
    cpu_s, started_at = _cpu_seconds(pid), time.perf_counter()
    num_events = asyncio.run(read_streams(port, streams, tokens))
    cpu_s, wall_s = _cpu_seconds(pid) - cpu_s, time.perf_counter() - started_at
    total = streams * tokens
    return {
        "cpu_us_per_token": cpu_s / total * 1e6,
        "tokens_per_event": total / num_events,
        "tokens_per_second": total / wall_s,
        "cpu_share": cpu_s / wall_s,
    }


async def read_streams(
    port: int, streams: int, tokens: int, prompt: Sequence[int] = (_TOKEN,)
) -> int:
    """Events of all streams of so many greedy tokens, read to their ends."""
    body: dict[str, Any] = {"prompt_token_ids": prompt, "max_tokens": tokens, "stream": True}
    content = orjson.dumps(body | {"ignore_eos": True, "temperature": 0, "method": "dense"})
    return sum(await asyncio.gather(*(_read_stream(port, content) for _ in range(streams))))


async def _read_stream(port: int, content: bytes) -> int:
    """Events of one stream, ``[DONE]`` not counted."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(content)}\r\n"
    writer.write(f"{head}content-type: application/json\r\n\r\n".encode() + content)
    num_events, tail = 0, b""
    while b"data: [DONE]" not in tail:
        part = await reader.read(1 << 16)
        if not part:
            raise ConnectionError(f"the stream ended early: {tail!r}")
        joined = tail + part
        num_events += joined.count(b"data: ") - tail.count(b"data: ")
        tail = joined[-64:]
    writer.close()
    return num_events - 1


def _cpu_seconds(pid: int) -> float:
    """User and system time of a process, all its threads together."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    app()
