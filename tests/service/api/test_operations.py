"""Probes, keys, limits, loading and shutdown, where it matters over a real socket."""

import asyncio
import gc
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from service.main import create_app
from service.server import Server
from service.settings import Settings
from tests.service.fake_engine import WORDS, FakeEngine, http_client, running_server, wait_until

pytestmark = pytest.mark.anyio
ROOT = Path(__file__).parent.parent.parent.parent
PROBES = ("/health", "/health/live", "/health/ready")


async def test_probes_of_a_loaded_server_are_green() -> None:
    async with http_client(FakeEngine()) as client:
        for path in PROBES:
            assert (await client.get(path)).status_code == 200


async def test_a_dead_or_draining_engine_is_not_ready_but_the_process_lives() -> None:
    engine = FakeEngine()
    async with http_client(engine) as client:
        engine.drain()
        response = await client.get("/health/ready")
        assert response.status_code == 503
        assert response.headers["retry-after"] == "5"
        assert "draining" in response.json()["error"]["message"]
        refused = await client.post("/generate", json={"prompt": "p"})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        engine.is_alive = False
        assert "not running" in (await client.get("/health")).json()["error"]["message"]
        assert (await client.get("/health/live")).status_code == 200


async def test_while_the_model_loads_all_but_probes_and_metrics_wait() -> None:
    may_load = threading.Event()

    def load(_events: object) -> Any:
        may_load.wait(10)
        return FakeEngine()

    app = create_app(Settings(), load)
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        assert (await client.get("/health/live")).status_code == 200
        assert (await client.get("/metrics")).status_code == 200
        for path in ("/health", "/methods", "/server_info"):
            response = await client.get(path)
            assert response.status_code == 503
            assert "loading" in response.json()["error"]["message"]
            assert "retry-after" in response.headers
        assert (await client.post("/generate", content=b"{")).status_code == 503
        may_load.set()
        await asyncio.to_thread(wait_until, lambda: app.state.holder.is_loaded)
        assert (await client.get("/health")).status_code == 200


def test_a_server_whose_model_cannot_be_loaded_ends_with_an_error() -> None:
    def load(_events: object) -> Any:
        raise RuntimeError("no such model")

    app = create_app(Settings(), load)
    server = Server(Settings(port=0), app, lambda _: None)
    thread = threading.Thread(target=server.run)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert server.exit_code == 1
    assert str(app.state.holder.failure) == "no such model"


@pytest.mark.parametrize("metrics_need_key", [False, True])
async def test_every_route_but_the_probes_needs_a_key(metrics_need_key: bool) -> None:
    keys = (SecretStr("first"), SecretStr("second"))
    guarded = Settings().model_copy(update={"api_keys": keys, "metrics_need_key": metrics_need_key})
    async with http_client(FakeEngine(guarded)) as client:
        for path in PROBES:
            assert (await client.get(path)).status_code == 200
        assert ((await client.get("/metrics")).status_code == 401) == metrics_need_key
        for path in ("/methods", "/openapi.json", "/docs", "/version", "/server_info", "/nope"):
            response = await client.get(path)
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
            assert response.json()["error"]["type"] == "UnauthorizedError"
        for headers in ({"Authorization": "Bearer second"}, {"X-API-Key": "first"}):
            assert (await client.get("/methods", headers=headers)).status_code == 200
        for value in ("Bearer wrong", "Bearer ", "Basic first", "first", ""):
            response = await client.get("/methods", headers={"Authorization": value})
            assert response.status_code == 401
        info = await client.get("/server_info", headers={"X-API-Key": "first"})
        assert "first" not in info.text


async def test_a_sane_request_id_is_kept_and_another_replaced() -> None:
    async with http_client(FakeEngine()) as client:
        kept = await client.get("/version", headers={"X-Request-Id": "abc-1.2"})
        assert kept.headers["x-request-id"] == "abc-1.2"
        for bad in ("a b", "x" * 129, '"', ""):
            replaced = await client.get("/version", headers={"X-Request-Id": bad})
            assert len(replaced.headers["x-request-id"]) == 32


async def test_the_registry_is_listed_with_schemas() -> None:
    async with http_client(FakeEngine()) as client:
        listing = (await client.get("/methods")).json()
        assert listing == (await client.get("/v1/methods")).json()
        assert listing["default"] == {"method": "streaming", "version": "v1"}
        for page in listing["methods"]:
            assert page["latest"] == page["versions"][-1]["version"]
            one = await client.get(f"/methods/{page['name']}", params={"version": page["latest"]})
            assert one.json()["versions"] == page["versions"][-1:]
            assert page["versions"][0]["params_schema"]["type"] == "object"
        assert (await client.get("/v1/methods/dense")).json()["name"] == "dense"
        unknown = (await client.get("/methods/nope"), await client.get("/methods/dense?version=v9"))
        assert [response.status_code for response in unknown] == [404, 404]
        assert unknown[1].json()["error"]["param"] == "version"


async def test_openapi_documents_request_and_response() -> None:
    async with http_client(FakeEngine()) as client:
        document = (await client.get("/openapi.json")).json()
    route = document["paths"]["/generate"]["post"]
    body = route["requestBody"]["content"]["application/json"]["schema"]
    assert body["properties"]["top_p"]["maximum"] == 1
    assert body["additionalProperties"] is False
    answer = route["responses"]["200"]["content"]["application/json"]["schema"]
    assert answer["$ref"].endswith("GenerateResponse")
    assert {parameter["name"] for parameter in route["parameters"]} == {"method", "version"}
    assert "422" not in route["responses"]
    assert "$defs" not in str(document)


async def test_server_info_tells_what_runs_but_no_paths() -> None:
    async with http_client(FakeEngine()) as client:
        info = (await client.get("/server_info")).json()
    assert (info["attention"], info["model"]) == ("reference", "fake")
    assert info["status"]["num_pages_total"] == 64
    assert not {"model", "calibration", "api_keys"} & set(info["settings"])
    assert info["notes"] == ["2 MLPs are fused."]
    assert info["self_test"]["tolerance"] == 1e-3


def test_an_endless_chunked_body_is_refused_while_it_is_sent() -> None:
    engine = FakeEngine(Settings(max_body_bytes=100_000))
    with running_server(engine) as address:
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as client:
            client.sendall(
                b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Transfer-Encoding: chunked\r\n\r\n"
            )
            for _ in range(11):
                client.sendall(b"2710\r\n" + b" " * 10_000 + b"\r\n")
            answer = client.recv(4096)  # the body has not ended
    assert answer.startswith(b"HTTP/1.1 413")
    assert not engine.requests


def test_a_declared_length_over_the_limit_is_refused_unread() -> None:
    with running_server(FakeEngine(Settings(max_body_bytes=1024))) as address:
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as client:
            client.sendall(
                b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: 64000000\r\n\r\n"
            )
            assert client.recv(4096).startswith(b"HTTP/1.1 413")


def start_process(step_s: float, shutdown_s: float) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "tests.service.fake_engine", str(step_s), str(shutdown_s)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def test_sigterm_lets_a_stream_finish_refuses_new_work_and_exits_with_0() -> None:
    process, address = start_process(1, 30)  # four steps, long enough to ask for all of this
    with process, httpx.Client(base_url=address, timeout=20) as client:
        body = {"prompt": "p", "stream": True}
        with client.stream("POST", "/generate", json=body) as response:
            lines = response.iter_lines()
            first = next(lines)
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: client.get("/health/ready").status_code == 503)
            assert client.post("/generate", json={"prompt": "p"}).status_code == 503
            assert client.get("/health/live").status_code == 200
            text = first + "".join(lines)
        assert all(f'"text":"{word}"' in text for word in WORDS)
        assert text.endswith("data: [DONE]")
        assert process.wait(10) == 0


def test_what_does_not_finish_in_time_is_ended_and_told() -> None:
    process, address = start_process(0.6, 0.5)
    with process:
        body = {"prompt": "p", "stream": True}
        with httpx.stream("POST", address + "/generate", json=body, timeout=20) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = "".join(lines)
        assert '"error"' in rest
        assert rest.endswith("data: [DONE]")
        assert process.wait(10) == 0


def test_an_idle_server_ends_at_once() -> None:
    process, _ = start_process(0, 60)
    with process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def test_a_dead_engine_ends_the_process_with_an_error() -> None:
    engine = FakeEngine()
    app = create_app(Settings(), lambda _: engine)  # type: ignore[arg-type, return-value]
    server = Server(Settings(port=0), app, lambda _: setattr(engine, "is_alive", False))
    server.run()
    assert server.exit_code == 1


async def test_the_garbage_collector_never_looks_at_what_was_loaded_again() -> None:
    kept: list[list[int]] = []

    def load(_events: object) -> Any:
        kept.extend([number] for number in range(1000))  # as a tokenizer has them
        return FakeEngine()

    app = create_app(Settings(), load)
    async with app.router.lifespan_context(app):
        await asyncio.to_thread(wait_until, lambda: app.state.holder.is_loaded)
        looked_at = {id(one) for one in gc.get_objects()}
        assert not looked_at & {id(one) for one in kept}
    assert gc.get_freeze_count() == 0


async def test_threads_wait_for_each_other_for_less_than_a_step() -> None:
    before = sys.getswitchinterval()
    app = create_app(Settings(), lambda _: FakeEngine())  # type: ignore[arg-type, return-value]
    async with app.router.lifespan_context(app):
        assert sys.getswitchinterval() == pytest.approx(0.0005)
    assert sys.getswitchinterval() == before
