"""What a real process withstands: hostile bytes, its own death, and that of its engine."""

import contextlib
import json
import signal
import socket
import threading
import time
from pathlib import Path

import httpx
import pytest

pytestmark = pytest.mark.timeout(300)

ROOT = Path(__file__).parent.parent.parent
MODEL = ROOT / "service" / "default_model"
PRIVATE = "Zanzibar-is-nobodys-business"
BREAKS = """
import service.engine.core
def step(self):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
service.engine.core.EngineCore.step = step
"""
HANGS = """
import time, service.engine.core
service.engine.core.EngineCore.step = lambda self: time.sleep(1e6)
"""


@pytest.fixture(scope="module")
def hostile():
    """A server that tells all it would ever tell, with little patience."""
    from tests.e2e.conftest import Server

    server = Server("--client-timeout-s", "1", "--log-level", "debug").wait_ready()
    yield server
    assert PRIVATE not in server.stop()


def open_connection(server):
    return socket.create_connection(("127.0.0.1", server.port), timeout=30)


def receive_all(connection):
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            received += part
    return received


def status_of(received):
    return int(received.split(b" ")[1])


def resident_bytes(server):
    lines = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def head(length, path="/generate"):
    return (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{length}\r\n\r\n"
    ).encode()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt_token_ids": [10**9]}, "prompt_token_ids"),
        ({"prompt_token_ids": [5, 4096]}, "prompt_token_ids"),
        ({"prompt_token_ids": [5] * 200_000}, "prompt"),
        ({"prompt": (PRIVATE + " ") * 20_000}, "prompt"),
        ({"prompt": PRIVATE, "method": "oracle_topk"}, "method"),
    ],
)
def test_what_only_the_engine_can_refuse(hostile, body, param):
    answer = hostile.client.post("/generate", json=body)
    assert answer.status_code == 400
    assert len(answer.content) <= 2048
    assert answer.json()["error"]["param"] == param
    assert str(ROOT) not in answer.text


@pytest.mark.parametrize("is_declared", [True, False])
def test_100_mb_are_refused_and_not_kept(hostile, is_declared):
    before = resident_bytes(hostile)
    size = 100 * 2**20
    with open_connection(hostile) as connection, contextlib.suppress(ConnectionError):
        if is_declared:
            connection.sendall(head(f"Content-Length: {size}"))
        else:
            connection.sendall(head("Transfer-Encoding: chunked"))
            for _ in range(100):
                connection.sendall(b"100000\r\n" + b" " * 2**20 + b"\r\n")
    with open_connection(hostile) as connection:
        connection.sendall(head(f"Content-Length: {size}"))
        assert status_of(receive_all(connection)) == 413
    assert resident_bytes(hostile) - before < 40 * 2**20
    assert hostile.generate("It was", max_tokens=2)["usage"]["completion_tokens"] == 2


def test_slow_heads_and_bodies_are_ended_while_others_are_served(hostile):
    with contextlib.ExitStack() as stack:
        slow = []
        for index in range(100):
            slow.append(stack.enter_context(open_connection(hostile)))
            sent = b"GET /health HT" if index % 2 else head("Content-Length: 50") + b'{"prompt'
            slow[-1].sendall(sent)
        assert hostile.generate("It was", max_tokens=2)["usage"]["completion_tokens"] == 2
        assert {status_of(receive_all(connection)) for connection in slow} == {408}


def test_who_closes_its_half_is_gone_and_leaves_no_page(hostile):
    before = hostile.metric("aborted_requests_total", reason="client")
    body = json.dumps({"prompt": PRIVATE, "max_tokens": 4000, "ignore_eos": True}).encode()
    with open_connection(hostile) as connection:
        connection.sendall(head(f"Content-Length: {len(body)}") + body)
        hostile.wait_metric("running_requests", 1)
        connection.shutdown(socket.SHUT_WR)
        hostile.wait_metric("aborted_requests_total", before + 1, reason="client")
        hostile.wait_metric("kv_cache_pages_used", 0)


def test_probes_are_answered_while_the_engine_is_busy(hostile):
    """The processor is shared, so no time is asserted; none of them waits for the engine."""
    answers = []

    def ask():
        answers.append(hostile.generate(f"{PRIVATE} " * 150, max_tokens=30, ignore_eos=True))

    thread = threading.Thread(target=ask)
    thread.start()
    num_probes = 0
    with httpx.Client(base_url=hostile.url) as client:
        while thread.is_alive():
            assert client.get("/health/ready").status_code == 200
            num_probes += 1
    assert answers
    assert num_probes > 20


def test_garbage_is_refused_and_nothing_of_it_is_logged(hostile):
    """The log is read when this server ends."""
    for data in (
        PRIVATE.encode() + b"\r\n\r\n",
        b"GET /" + PRIVATE.encode() + b" HTTP/3.0\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + PRIVATE.encode() + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: " + PRIVATE.encode() * 10_000 + b"\r\n\r\n",
    ):
        with open_connection(hostile) as connection, contextlib.suppress(ConnectionError):
            connection.sendall(data)
            assert status_of(receive_all(connection)) in {400, 431}
    for path in (f"/{PRIVATE}", f"/generate?method={PRIVATE}", f"/methods/{PRIVATE}"):
        assert hostile.client.get(path).status_code in {404, 405}
    bad = hostile.client.post("/generate", json={"prompt": PRIVATE, PRIVATE: 1})
    assert bad.status_code == 400
    assert hostile.generate(PRIVATE, max_tokens=2)["usage"]["completion_tokens"] == 2


def files_of(directory):
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_a_killed_server_starts_again_at_once_and_nothing_on_disk_is_broken(start_server, tmp_path):
    own = {"TMPDIR": str(tmp_path / "tmp"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    for path in own.values():
        Path(path).mkdir()
    model_before = files_of(MODEL)
    server = start_server(env=own).wait_ready()
    expected = server.generate("It was", max_tokens=8)["text"]
    outcomes: list[object] = []

    def ask():
        try:
            with httpx.Client(base_url=server.url, timeout=60) as client:
                body = {"prompt": "once " * 500, "max_tokens": 2000, "ignore_eos": True}
                outcomes.append(client.post("/generate", json={**body, "stream": True}))
        except httpx.TransportError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    server.wait_metric("running_requests", 6)
    server.process.kill()
    assert server.process.wait(20) == -signal.SIGKILL
    for thread in threads:
        thread.join(30)
    assert len(outcomes) == 6
    assert all(isinstance(outcome, httpx.TransportError) for outcome in outcomes)
    assert files_of(MODEL) == model_before

    killed_while_loading = start_server(env=own, port=server.port)
    time.sleep(0.5)
    killed_while_loading.process.kill()
    killed_while_loading.process.wait(20)
    again = start_server(env=own, port=server.port).wait_ready()
    assert again.generate("It was", max_tokens=8)["text"] == expected
    assert again.metric("kv_cache_pages_used") == 0
    assert files_of(MODEL) == model_before


def test_a_server_whose_engine_only_fails_says_so_and_ends(start_server):
    server = start_server(prelude=BREAKS).wait_ready()
    statuses = []
    with contextlib.suppress(httpx.TransportError):
        for _ in range(20):
            answer = server.client.post("/generate", json={"prompt": PRIVATE})
            statuses.append(answer.status_code)
            assert "illegal" not in answer.text
    assert statuses[:9] == [500] * 9
    assert set(statuses[9:]) <= {500, 503}
    assert server.process.wait(30) == 1
    server.close()
    assert "illegal memory access" in server.output
    assert "10 steps in a row failed" in server.output
    assert PRIVATE not in server.output


def test_readiness_says_within_5_s_that_the_engine_cannot_go_on(start_server):
    server = start_server("--no-exit-on-engine-death", prelude=BREAKS).wait_ready()
    for _ in range(10):
        assert server.client.post("/generate", json={"prompt": PRIVATE}).status_code == 500
    deadline = time.monotonic() + 5
    while server.client.get("/health/ready").status_code == 200:
        assert time.monotonic() < deadline
    assert "cannot go on" in server.client.get("/health/ready").json()["error"]["message"]
    assert server.client.post("/generate", json={"prompt": PRIVATE}).status_code == 503


@pytest.mark.parametrize("stays", [False, True])
def test_a_server_whose_engine_hangs_says_so_and_ends_unless_it_may_stay(start_server, stays):
    options = ["--stall-timeout-s", "0.3"]
    options += ["--no-exit-on-engine-death"] if stays else []
    server = start_server(*options, prelude=HANGS).wait_ready()
    for _ in range(20):  # an idle engine looks stuck, too, while the whole machine stands still
        answer = server.client.post("/generate", json={"prompt": PRIVATE})
        assert answer.status_code == 503
        assert "no progress" in answer.json()["error"]["message"]
        if "cannot go on" in answer.json()["error"]["message"]:
            break
    if stays:
        ready = server.client.get("/health/ready")
        assert ready.status_code == 503
        assert "cannot go on" in ready.json()["error"]["message"]
        assert server.client.get("/health/live").status_code == 200
        assert server.metric("engine_errors_total", kind="hang") == 1
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
    else:
        assert server.process.wait(30) == 1


def test_termination_does_not_wait_for_who_sends_or_reads_nothing(start_server):
    server = start_server("--shutdown-timeout-s", "2").wait_ready()
    with contextlib.ExitStack() as stack:
        for sent in (b"", b"GET / HT", head("Content-Length: 50") + b"{"):
            stack.enter_context(open_connection(server)).sendall(sent)
        body = json.dumps({"prompt": "x", "max_tokens": 4000, "stream": True}).encode()
        reader = stack.enter_context(open_connection(server))
        reader.sendall(head(f"Content-Length: {len(body)}") + body)
        server.wait_metric("running_requests", 1)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(40) == 0
        assert b"[DONE]" in receive_all(reader)
