"""A real server in a process of its own, and a client that is told what it refuses."""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

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
    return content
