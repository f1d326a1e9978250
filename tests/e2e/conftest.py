"""A real server process with the built-in model."""

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).parent.parent.parent
PROMPT = "The old house stood at the end of the road, and"
CHAT: list[Any] = [{"role": "user", "content": "Who lives in the old house?"}]


def free_port() -> int:
    """A port of this machine that nobody listened on a moment ago."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Server:
    """A running ``sparseserve serve``.

    Args:
        env: Added to the environment.
        port: Where it listens; a free one if not given.
        prelude: Python that breaks something first.
    """

    def __init__(self, *options, env=None, port=None, prelude=None):
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        program = ["-m", "service.cli"]
        if prelude is not None:
            program = ["-c", f"{prelude}\nfrom service.cli import app\napp()"]
        command = [sys.executable, *program, "serve", "--port", str(self.port)]
        # A file, because a pipe that nobody reads would stop the server.
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the server
        self.process = subprocess.Popen(
            [*command, *options],
            cwd=ROOT,
            env={**os.environ, **(env or {})},
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )
        self.client = httpx.Client(base_url=self.url, timeout=280)

    def wait_ready(self, timeout_s=120):
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                if self.client.get("/health/ready").status_code == 200:
                    return self
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        raise AssertionError(f"the server did not become ready:\n{self.stop()}")

    def generate(self, prompt, **fields):
        """Complete a prompt, all of which is computed unless ``cache_salt`` says otherwise."""
        fields.setdefault("cache_salt", secrets.token_hex(8))
        query: dict[str, Any] = {}
        query |= {k: fields.pop(k) for k in ("method", "version") if k in fields}
        answer = self.client.post(
            "/generate", params=query, json={"prompt": prompt, "temperature": 0, **fields}
        )
        assert answer.status_code == 200, answer.text
        return answer.json()

    def metric(self, name, **labels):
        """Sum of the samples of a metric that carry these labels."""
        total = 0.0
        for line in self.client.get("/metrics").text.splitlines():
            head, _, value = line.rpartition(" ")
            label_part = head.partition("{")[2]
            wanted = all(f'{k}="{v}"' in label_part for k, v in labels.items())
            if head.partition("{")[0] == f"sparseserve_{name}" and wanted:
                total += float(value)
        return total

    def wait_metric(self, name, value, timeout_s=30, **labels):
        deadline = time.monotonic() + timeout_s
        while (seen := self.metric(name, **labels)) != value:
            assert time.monotonic() < deadline, f"{name} is {seen}, not {value}"
            time.sleep(0.05)

    def stop(self, *, timeout_s=30):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(timeout_s)
        finally:
            self.close()
        return self.output

    def close(self):
        """End the process, whatever it does, and keep what it logged."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.client.close()
        if not self.log.closed:
            self.log.seek(0)
            self.output = self.log.read()
            self.log.close()


@pytest.fixture(scope="session")
def server():
    running = Server("--max-step-tokens", "1024").wait_ready()
    yield running
    running.stop()


@pytest.fixture
def start_server():
    """Start servers of one's own; all are stopped at the end."""
    started = []

    def start(*options, **kwargs):
        started.append(Server(*options, **kwargs))
        return started[-1]

    yield start
    for one in started:
        one.close()


@pytest.fixture(scope="session")
def planted():
    return json.loads((ROOT / "examples" / "planted_number.json").read_text())


@pytest.fixture(scope="module")
def client(server):
    """OpenAI's, a package that nothing else here needs."""
    import openai

    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as one:
        yield one


@pytest.fixture(scope="module")
def model(client):
    """The name of the served one."""
    (card,) = client.models.list().data
    return card.id
