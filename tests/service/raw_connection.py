"""Bytes on a socket, and the answers that came back: what no HTTP client would send or show."""

import contextlib
import socket
from dataclasses import dataclass

import httpx
import orjson

BODY = b'{"prompt": "p"}'
POST = (
    b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n" % len(BODY)
)
GET = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error_type(self) -> str:
        return str(orjson.loads(self.body)["error"]["type"])


def answers(data: bytes) -> list[Answer]:
    """Split what a connection received into its responses."""
    found = []
    while data:
        head, _, data = data.partition(b"\r\n\r\n")
        lines = head.decode("ascii").split("\r\n")
        headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines[1:])}
        body = b""
        if headers.get("transfer-encoding") == "chunked":
            while True:
                size, _, data = data.partition(b"\r\n")
                body, data = body + data[: int(size, 16)], data[int(size, 16) + 2 :]
                if int(size, 16) == 0:
                    break
        else:
            length = int(headers.get("content-length", 0))
            body, data = data[:length], data[length:]
        found.append(Answer(int(lines[0].split(" ")[1]), headers, body))
    return found


class Client:
    """A raw connection."""

    def __init__(self, address: str) -> None:
        host, port = address.removeprefix("http://").split(":")
        self.socket = socket.create_connection((host, int(port)), timeout=20)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def send(self, data: bytes) -> None:
        with contextlib.suppress(ConnectionError):  # refused before all of it was sent
            self.socket.sendall(data)

    def until_closed(self) -> list[Answer]:
        data = b""
        with contextlib.suppress(ConnectionResetError):
            while part := self.socket.recv(65536):
                data += part
        return answers(data)


def head(*lines: bytes, start: bytes = b"GET /health/live HTTP/1.1") -> bytes:
    return b"\r\n".join([start, b"Host: x", *lines, b"", b""])


def assert_still_works(address: str) -> None:
    assert httpx.post(address + "/generate", json={"prompt": "p"}).status_code == 200
