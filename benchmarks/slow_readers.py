"""Two hundred clients that read one byte a second: what the others and the memory feel of them.

``python -m benchmarks.slow_readers`` measures some ordinary clients alone, lets the slow ones ask
for long streams and waits until the engine is done with them, then measures again while all of them
sit on what they have not read. The server is told to be more patient with them than it usually is.
"""

import asyncio
import socket
import statistics
import time
from typing import Any

import httpx
import orjson
import typer

from benchmarks.load import RunningServer, answer, running_server
from benchmarks.report import save

app = typer.Typer()
_NUM_OTHERS = 4
_PROMPT = "The old man looked at the sea and thought of the boats that had gone out."
_ORDINARY: dict[str, Any] = {"prompt": _PROMPT, "max_tokens": 16, "temperature": 0}
# Twenty log-probabilities a token make an event of a kilobyte or two.
_HEAVY: dict[str, Any] = {
    "prompt": _PROMPT,
    "max_tokens": 48,
    "ignore_eos": True,
    "logprobs": 20,
    "stream": True,
}
_RECEIVE_BUFFER_BYTES = 4096
# The few pages (128) are all written to by the first clients: a cache is lazily taken memory, too.
_OPTIONS = (
    "--client-timeout-s=600",
    "--max-running-requests=64",
    "--kv-cache-bytes=67108864",
)


@app.command()
def measure(readers: int = 200, seconds: float = 20, *, write: bool = True) -> None:
    """Measure before, and with so many slow readers, for so many seconds each."""
    with running_server(*_OPTIONS) as server:
        result = asyncio.run(_compare(server, readers, seconds))
    for key, value in result.items():
        print(f"{key:44s} {value:10.3f}")
    if write:
        print(f"written to {save('slow-readers', result)}")


async def _compare(server: RunningServer, readers: int, seconds: float) -> dict[str, float]:
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
        await _fill_cache(client)
        before = await _others(client, seconds)
        idle_bytes = server.resident_bytes
        slow = [asyncio.create_task(_read_slowly(server.port)) for _ in range(readers)]
        await _until_made(client, readers)
        stuck_bytes = server.resident_bytes
        beside = await _others(client, seconds)
        late_bytes = server.resident_bytes
        ended = [task for task in slow if task.done()]
        for task in slow:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)
        await _until_made(client, readers)
    if ended:
        raise RuntimeError(f"{len(ended)} slow readers were let go, or had read everything")
    return {
        "slow readers": readers,
        "p50 of the others without them, s": statistics.median(before),
        "p50 of the others beside them, s": statistics.median(beside),
        "slowdown of the others": statistics.median(beside) / statistics.median(before) - 1,
        "RSS without them, MiB": idle_bytes / 2**20,
        "memory per slow reader, KiB": (stuck_bytes - idle_bytes) / readers / 1024,
        "RSS growth while they sit": late_bytes / stuck_bytes - 1,
    }


async def _fill_cache(client: httpx.AsyncClient) -> None:
    """Write to every page, by prompts that nobody shares."""
    for number in range(8):
        request = {**_ORDINARY, "prompt": f"{number} " + _PROMPT * 120, "cache_salt": str(number)}
        await answer(client, request)


async def _others(client: httpx.AsyncClient, seconds: float) -> list[float]:
    """Seconds that each request of the ordinary clients took."""
    deadline, taken = time.monotonic() + seconds, []

    async def one() -> None:
        while time.monotonic() < deadline:
            started_at = time.perf_counter()
            await answer(client, _ORDINARY)
            taken.append(time.perf_counter() - started_at)

    await asyncio.gather(*(one() for _ in range(_NUM_OTHERS)))
    return taken


async def _read_slowly(port: int) -> None:
    """Ask for a long stream and read one byte of it a second."""
    loop, content = asyncio.get_running_loop(), orjson.dumps(_HEAVY)
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER_BYTES)
        one.setblocking(False)  # noqa: FBT003 - its only argument
        await loop.sock_connect(one, ("127.0.0.1", port))
        head = f"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n"
        await loop.sock_sendall(
            one, f"{head}content-type: application/json\r\n\r\n".encode() + content
        )
        while await loop.sock_recv(one, 1):  # noqa: ASYNC110 - nobody is waited for: it is the pace
            await asyncio.sleep(1)


async def _until_made(client: httpx.AsyncClient, num_asked: int) -> None:
    """Wait until the engine has made whatever the slow readers asked for."""
    name = "sparseserve_generated_tokens_total{"
    while True:
        lines = (await client.get("/metrics")).text.splitlines()
        values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        num_tokens = sum(float(value) for key, value in values.items() if key.startswith(name))
        is_idle = all(
            float(values[f"sparseserve_{state}_requests"]) == 0 for state in ("running", "waiting")
        )
        if is_idle and num_tokens >= num_asked * _HEAVY["max_tokens"]:
            return
        await asyncio.sleep(0.2)


if __name__ == "__main__":
    app()
