"""An engine that cannot go on: what probes say, what clients are told, how the process ends."""

import contextlib
import socket
import threading
from typing import Any

import httpx
import pytest

from service.api.holder import EngineHolder
from service.engine.engine import Engine
from service.engine.events import NoEvents
from service.engine.watchdog import Watchdog
from service.main import create_app
from service.server import Server
from service.settings import Settings
from tests.service.fake_engine import FakeEngine, fake_app, wait_until


@contextlib.contextmanager
def serving(settings, load):
    """A real server in a thread that may end by itself: yields it with its address."""
    addresses: list[str] = []
    server = Server(settings, create_app(settings, load), addresses.append)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: bool(addresses), 30)
        yield server, addresses[0], thread
    finally:
        server.should_exit = True
        thread.join(20)
    assert not thread.is_alive()


class Blocked:
    """An engine on a tiny model whose next step stands still until it is let go.

    A machine that stands still as well for a moment makes any engine look stuck, so nobody is
    impatient before that step.
    """

    def __init__(self, directory, **settings) -> None:
        self.settings = Settings(model=directory, device="cpu", method="dense", port=0, **settings)
        self.is_inside, self.goes_on = threading.Event(), threading.Event()

    def load(self, events):
        engine = Engine.load(self.settings, events)
        original = engine.runner.run

        def run(chunks):
            self.is_inside.set()
            self.goes_on.wait(60)
            return original(chunks)

        engine.runner.run = run  # type: ignore[method-assign]
        self.engine = engine
        return engine

    def becomes_impatient(self) -> None:
        assert self.is_inside.wait(20)
        self.engine._watchdog = Watchdog(0.8)


def ask_in_background(address):
    """Send a request; its answer is the only item of the list, once it has come."""
    answers: list[httpx.Response] = []

    def ask():
        body = {"prompt": "Once", "max_tokens": 4}
        answers.append(httpx.post(address + "/generate", json=body, timeout=60))

    thread = threading.Thread(target=ask)
    thread.start()
    return thread, answers


def test_probes_are_answered_while_a_step_stands_still(tiny_model_dir):
    blocked = Blocked(tiny_model_dir)
    with serving(blocked.settings, blocked.load) as (_, address, _):
        thread, answers = ask_in_background(address)
        assert blocked.is_inside.wait(20)
        with httpx.Client(base_url=address) as client:
            for _ in range(20):
                for path in ("/health", "/health/live", "/health/ready", "/metrics"):
                    assert client.get(path).status_code == 200
        assert not answers, "the step did not stand still"
        blocked.goes_on.set()
        thread.join(30)
        assert answers[0].status_code == 200


def test_a_stuck_engine_is_not_ready_and_is_again_once_it_goes_on(tiny_model_dir):
    blocked = Blocked(tiny_model_dir, stall_timeout_s=4)
    with serving(blocked.settings, blocked.load) as (_, address, _):
        thread, answers = ask_in_background(address)
        assert blocked.is_inside.wait(20)
        wait_until(lambda: httpx.get(address + "/health/ready").status_code == 503)
        ready = httpx.get(address + "/health/ready")
        assert "no progress" in ready.json()["error"]["message"]
        assert httpx.get(address + "/health/live").status_code == 200
        refused = httpx.post(address + "/generate", json={"prompt": "p"})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        blocked.goes_on.set()
        thread.join(30)
        assert answers[0].status_code == 200
        wait_until(lambda: httpx.get(address + "/health/ready").status_code == 200)


@pytest.mark.parametrize("exits", [True, False])
def test_an_engine_that_hangs_is_given_up(tiny_model_dir, exits):
    blocked = Blocked(tiny_model_dir, exit_on_engine_death=exits)
    with serving(blocked.settings, blocked.load) as (server, address, thread):
        asking, answers = ask_in_background(address)
        blocked.becomes_impatient()
        asking.join(30)
        assert answers[0].status_code == 503
        assert "no progress" in answers[0].json()["error"]["message"]
        if exits:
            thread.join(30)
            assert not thread.is_alive()
            assert server.exit_code == 1
        else:
            ready = httpx.get(address + "/health/ready")
            assert ready.status_code == 503
            assert "cannot go on" in ready.json()["error"]["message"]
            assert httpx.get(address + "/health/live").status_code == 200
            metrics = httpx.get(address + "/metrics").text
            assert 'engine_errors_total{kind="hang"} 1.0' in metrics
        assert blocked.engine.is_busy
        blocked.goes_on.set()
    wait_until(lambda: not blocked.engine.is_busy)
    assert blocked.engine.status().num_pages_used == 0


def test_a_server_whose_operator_wants_it_to_stay_outlives_its_engine():
    settings = Settings(port=0, exit_on_engine_death=False)
    engine = FakeEngine(settings)
    with serving(settings, lambda _: engine) as (server, address, thread):
        engine.is_alive = False
        wait_until(lambda: httpx.get(address + "/health/ready").status_code == 503)
        assert httpx.get(address + "/health/live").status_code == 200
        wait_until(lambda: server._is_dead)
        assert thread.is_alive()
    assert server.exit_code == 0


def test_a_model_that_comes_in_while_the_server_looks_is_no_dead_engine(monkeypatch):
    settings = Settings(port=0)
    engine = FakeEngine(settings)
    app = fake_app(engine)
    server, holder = Server(settings, app, lambda _: None), app.state.holder
    loading = holder.status()
    holder.start(NoEvents())
    wait_until(lambda: holder.is_loaded)
    with monkeypatch.context() as earlier:
        earlier.setattr(holder, "status", lambda: loading)
        assert not server._has_failed()
    assert not server._has_failed()
    engine.is_alive = False
    assert server._has_failed()


class Panic(BaseException):
    """What a library in Rust raises."""


@pytest.mark.parametrize("error", [RuntimeError("no"), Panic("no"), SystemExit("no")])
@pytest.mark.parametrize("where", ["load", "start"])
def test_whatever_keeps_the_model_from_loading_ends_the_server(error, where, monkeypatch):
    settings = Settings(port=0)
    engine = FakeEngine(settings)

    def fail(*_):
        raise error

    monkeypatch.setattr(engine, "start", fail)
    load: Any = fail if where == "load" else lambda _: engine
    app = create_app(settings, load)
    server = Server(settings, app, lambda _: None)
    server.run()
    assert server.exit_code == 1
    assert app.state.holder.failure is error


def test_who_is_told_to_stop_while_the_model_loads_leaves_no_engine():
    goes_on = threading.Event()
    engine = FakeEngine()

    def load(_):
        goes_on.wait(20)
        return engine

    holder = EngineHolder(load)
    holder.start(NoEvents())
    holder.stop()
    goes_on.set()
    wait_until(lambda: engine.is_stopped)
    wait_until(lambda: not holder.is_busy)
    assert not engine.is_alive


def test_an_address_that_is_taken_is_an_end_with_1(caplog):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = Settings(port=taken.getsockname()[1])
        server = Server(settings, fake_app(FakeEngine(settings)), lambda _: None)
        server.run()
    assert server.exit_code == 1
    assert "address already in use" in caplog.text


def test_many_connections_are_many_open_files():
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = 256
    resource.setrlimit(resource.RLIMIT_NOFILE, (low, hard))
    try:
        settings = Settings(port=0, max_connections=300)
        server = Server(settings, fake_app(FakeEngine(settings)), lambda _: None)
        server.should_exit = True
        server.run()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= min(300, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
