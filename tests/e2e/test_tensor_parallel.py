"""A server of two processes: the same answers, and when one of them dies, both end."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.parallel import followers

pytestmark = pytest.mark.timeout(300)

OPTIONS = (
    *("--tensor-parallel", "2", "--device", "cpu", "--dtype", "float32"),
    *("--kv-cache-bytes", "100000000", "--max-step-tokens", "512"),
)
CHUNKED: dict[str, Any] = {
    "prompt": "The river runs past the mill. " * 120,
    "max_tokens": 8,
    "ignore_eos": True,
}


def followers_of(server) -> list[int]:
    """Process ids of the other ranks."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            is_rank = "service.engine.follower" in (entry / "cmdline").read_text()
            if parent == server.process.pid and is_rank:
                found.append(int(entry.name))
    return found


def wait_until_gone(pids, timeout_s=30):
    deadline = time.monotonic() + timeout_s
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, f"{pids} still run"
        time.sleep(0.05)


@pytest.fixture
def pair(start_server):
    return start_server(*OPTIONS).wait_ready()


@pytest.mark.parametrize("method", ["dense", "flash_skip_softmax", "xattention"])
def test_two_ranks_answer_as_one_process(server, two_ranks, method):
    params: dict[str, Any] = {} if method == "dense" else {"dense_below": 0}
    if method == "flash_skip_softmax":
        params = {"prefill_threshold": 0.5, "decode_threshold": 0.5}
    for prompt in (CHUNKED["prompt"], "Hello"):
        asked = {**CHUNKED, "prompt": prompt, "method": method, "method_params": params}
        one, two = (s.generate(sparsity_detail="head", **asked) for s in (server, two_ranks))
        assert two["choices"][0]["token_ids"] == one["choices"][0]["token_ids"]
        assert two["sparsity"] == one["sparsity"]


@pytest.fixture(scope="module")
def two_ranks():
    from tests.e2e.conftest import Server

    running = Server(*OPTIONS).wait_ready()
    yield running
    pids = followers_of(running)
    output = running.stop()
    assert running.process.returncode == 0, output
    wait_until_gone(pids)


def test_a_rank_that_dies_ends_the_service_and_tells_its_clients(pair):
    [pid] = followers_of(pair)
    answers: list[httpx.Response | httpx.TransportError] = []

    def ask():
        try:
            body = {**CHUNKED, "max_tokens": 4000, "temperature": 0}
            answers.append(pair.client.post("/generate", json=body))
        except httpx.TransportError as error:
            answers.append(error)

    waiting = threading.Thread(target=ask)
    waiting.start()
    pair.wait_metric("running_requests", 1)
    os.kill(pid, signal.SIGKILL)
    assert pair.process.wait(followers._END_GRACE_S + 10) == 1
    waiting.join(10)
    pair.close()
    assert "; the service ends" in pair.output
    [answer] = answers
    assert not isinstance(answer, httpx.Response) or answer.status_code >= 500


def test_an_idle_service_ends_too(pair):
    [pid] = followers_of(pair)
    os.kill(pid, signal.SIGKILL)
    assert pair.process.wait(followers._END_GRACE_S + 10) == 1


def test_no_rank_outlives_the_first(pair):
    pids = followers_of(pair)
    pair.process.kill()
    wait_until_gone(pids)


def test_heads_that_cannot_be_divided_end_the_start_with_the_numbers():
    done = subprocess.run(
        [sys.executable, "-m", "service.cli", "generate", "x", "--tensor-parallel", "4"],
        env={**os.environ, "SPARSESERVE_DEVICE": "cpu"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 1
    assert "The 2 KV heads of attention layer 0 cannot be divided among 4 ranks" in done.stderr
