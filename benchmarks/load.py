"""A real server in a process of its own, and clients that check what they are answered."""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import orjson

_DRAIN_S = 60


@dataclass(frozen=True)
class RunningServer:
    """A server that is ready."""

    pid: int
    port: int

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def resident_bytes(self) -> int:
        """Memory of the process."""
        pages = Path(f"/proc/{self.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def running_server(*options: str) -> Iterator[RunningServer]:
    """Serve the built-in model; afterwards the server must drain and end in good order.

    Raises:
        RuntimeError: It did not become ready, or ended with another status than 0; its log is told.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "service.cli", "serve", "--port", str(port)]
    with (
        tempfile.TemporaryFile("w+") as log,  # a pipe that nobody reads would stop the server
        subprocess.Popen([*command, *options], stdout=log, stderr=log) as process,  # noqa: S603 - our own
    ):
        try:
            _wait_ready(process, port)
            yield RunningServer(process.pid, port)
            process.terminate()
            process.wait(_DRAIN_S)
        finally:
            process.kill()
            process.wait()
            log.seek(0)
            lines = log.readlines()
        if process.returncode:
            raise RuntimeError(f"the server ended with {process.returncode}: {lines[-3:]}")


def _wait_ready(process: subprocess.Popen[bytes], port: int) -> None:
    while process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"http://127.0.0.1:{port}/health/ready").status_code == 200:
                return
        time.sleep(0.1)
    raise RuntimeError("the server ended before it was ready")


class RefusedError(Exception):
    """The server answered with an error."""

    def __init__(self, status: int, text: str, headers: httpx.Headers | None = None) -> None:
        super().__init__(text)
        self.status, self.text = status, text
        self.headers = headers or httpx.Headers()


async def answer(client: httpx.AsyncClient, request: dict[str, Any]) -> dict[str, Any]:
    """The answer to ``POST /generate``, in one piece.

    Raises:
        RefusedError: It is an error.
    """
    response = await client.post("/generate", json=request)
    if response.status_code != 200:
        raise RefusedError(response.status_code, response.text, response.headers)
    content: dict[str, Any] = response.json()
    return {**content, "token_ids": content["choices"][0]["token_ids"]}


async def streamed_answer(client: httpx.AsyncClient, request: dict[str, Any]) -> dict[str, Any]:
    """The same put together from the events of a stream.

    Raises:
        RefusedError: It is an error, or one came in the middle.
    """
    texts, token_ids, last = [], [], {}
    async with stream(client, request) as events:
        async for event in events:
            if "error" in event:
                raise RefusedError(event["error"]["code"], str(event))
            texts.append(event["text"])
            token_ids += event["token_ids"]
            last = event
    return {**last, "text": "".join(texts), "token_ids": token_ids}


@asynccontextmanager
async def stream(
    client: httpx.AsyncClient, request: dict[str, Any]
) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
    """The events of a stream; leaving closes the connection."""
    async with client.stream("POST", "/generate", json={**request, "stream": True}) as response:
        if response.status_code != 200:
            text = (await response.aread()).decode()
            raise RefusedError(response.status_code, text, response.headers)
        yield events_of(response)


async def events_of(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The events of an answer that is a stream, but for ``[DONE]``."""
    async for line in response.aiter_lines():
        if line.startswith("data: {"):
            yield orjson.loads(line[6:])
