"""More connections, and more bytes at once, than a server holds."""

import contextlib
import select

import httpx

from service.settings import Settings
from tests.service.fake_engine import FakeEngine, running_server, wait_until
from tests.service.raw_connection import BODY, POST, Client, answers, assert_still_works


def test_connections_beyond_the_limit_are_good_for_probes_only():
    engine = FakeEngine(Settings(max_connections=3))
    with running_server(engine) as address, contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(Client(address)).send(b"GET / HT")
        with Client(address) as client:
            client.send(POST + BODY)
            [answer] = client.until_closed()
        assert (answer.status, answer.error_type) == (429, "TooManyRequestsError")
        assert answer.headers["retry-after"]
        for path in ("/health", "/health/live", "/health/ready", "/metrics"):
            assert httpx.get(address + path).status_code == 200
    assert not engine.requests


def is_dropped(client: Client) -> bool:
    client.socket.settimeout(0.01)
    try:
        return client.socket.recv(1) == b""
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False


def test_connections_far_beyond_the_limit_are_dropped():
    with (
        running_server(FakeEngine(Settings(max_connections=1))) as address,
        contextlib.ExitStack() as stack,
    ):
        clients = [stack.enter_context(Client(address)) for _ in range(80)]
        for client in clients:
            client.send(b"GET / HT")
        wait_until(lambda: sum(map(is_dropped, clients)) == 80 - 1 - 64)
        for client in clients[:40]:
            client.socket.close()
        wait_until(lambda: is_answered(address))


def is_answered(address: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(address + "/health/live").status_code == 200
    return False


def readable(clients: list[Client]) -> list[Client]:
    by_socket = {client.socket: client for client in clients}
    return [by_socket[one] for one in select.select(list(by_socket), [], [], 0)[0]]


def test_the_memory_for_bodies_that_are_being_read_is_limited():
    engine = FakeEngine(Settings(max_body_bytes=1024))
    with running_server(engine) as address, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(address)) for _ in range(40)]
        for client in clients:
            client.send(POST.replace(b"15", b"1001") + b" " * 1000)
        wait_until(lambda: len(readable(clients)) == 8)
        refused = readable(clients)
        for client in refused:
            [answer] = answers(client.socket.recv(65536))
            assert (answer.status, answer.error_type) == (429, "TooManyRequestsError")
            assert answer.headers["retry-after"]
        assert httpx.get(address + "/health").status_code == 200
        for client in clients:
            if client in refused:
                continue
            client.send(b"{")  # complete, though not JSON
            assert client.socket.recv(65536).startswith(b"HTTP/1.1 400")
        assert_still_works(address)
