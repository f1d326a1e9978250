"""Clients that do not read what they asked for: they cost little, harm nobody, and are let go."""

import contextlib
import socket
from collections.abc import Iterator

import httpx
import orjson

from service.settings import Settings
from tests.service.fake_engine import FakeEngine, running_server, wait_until

NUM_STUCK = 20
WORD_BYTES = 2**15
NUM_WORDS = 1000


class CountedWords(tuple[str, ...]):
    """Words of which it is known how many were asked for."""

    num_taken = 0

    def __iter__(self) -> Iterator[str]:
        for word in super().__iter__():
            type(self).num_taken += 1
            yield word


def stuck_client(address: str) -> socket.socket:
    """A client that asks for a stream and never reads it."""
    host, port = address.removeprefix("http://").split(":")
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect((host, int(port)))
    body = orjson.dumps({"prompt": "p", "stream": True})
    client.sendall(
        b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body) + body
    )
    return client


def test_who_does_not_read_takes_little_memory_slows_nobody_and_is_let_go() -> None:
    engine = FakeEngine(Settings(client_timeout_s=6))
    engine.words = CountedWords(("x" * WORD_BYTES,) * NUM_WORDS)
    with running_server(engine) as address, contextlib.ExitStack() as stack:
        for _ in range(NUM_STUCK):
            stack.enter_context(contextlib.closing(stuck_client(address)))
        wait_until(lambda: engine.num_running == NUM_STUCK)
        counts = [0]

        def has_settled() -> bool:
            counts.append(CountedWords.num_taken)
            return len(counts) > 20 and counts[-1] == counts[-20]

        wait_until(has_settled)
        # What the kernel holds of it, and a little on our side; the rest was never made.
        assert CountedWords.num_taken / NUM_STUCK * WORD_BYTES < 8 * 2**20 < NUM_WORDS * WORD_BYTES
        engine.words = ("short",)
        answer = httpx.post(address + "/generate", json={"prompt": "p"})
        assert answer.json()["text"] == "short"
        wait_until(lambda: engine.num_aborted == NUM_STUCK, 30)
        assert engine.num_running == 0
        assert engine.num_aborted == NUM_STUCK
