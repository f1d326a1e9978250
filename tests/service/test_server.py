"""An engine that cannot go on: what probes say, what clients are told, how the process ends."""

import contextlib
import threading

import httpx
import pytest

from service.engine.engine import Engine
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
    """An engine on a tiny model whose next step stands still until it is let go."""

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
    blocked = Blocked(tiny_model_dir, stall_timeout_s=0.2, exit_on_engine_death=exits)
    with serving(blocked.settings, blocked.load) as (server, address, thread):
        asking, answers = ask_in_background(address)
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
