"""What no HTTP client would send, over real sockets: one answer each, and the next one works."""

import contextlib
import re
import socket
import time

import httpx
import orjson
import pytest

from service.connection import MAX_HEAD_BYTES, MAX_HEADERS
from service.settings import Settings
from tests.service.fake_engine import FakeEngine, running_server, wait_until
from tests.service.raw_connection import BODY, GET, POST, Client, answers, assert_still_works, head


@pytest.fixture(scope="module")
def engine():
    return FakeEngine(Settings())


@pytest.fixture(scope="module")
def address(engine):
    with running_server(engine) as one:
        yield one


@pytest.fixture(scope="module")
def impatient():
    """The address of a server that waits a second for the rest of a request, which never comes."""
    hasty = FakeEngine(Settings(client_timeout_s=1))
    with running_server(hasty) as one:
        yield one
    assert not hasty.requests


MALFORMED = {
    "no HTTP": b"hello\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/9.9": b"GET /health/live HTTP/9.9\r\nHost: x\r\n\r\n",
    "no version": b"GET /health/live\r\n\r\n",
    "a version of 1 MB": b"GET / HTTP/1." + b"1" * 2**20 + b"\r\n\r\n",
    "an unknown verb": b"FROB / HTTP/1.1\r\nHost: x\r\n\r\n",
    "a verb of 1 MB": b"A" * 2**20,
    "control characters in the verb": b"G\x00T / HTTP/1.1\r\nHost: x\r\n\r\n",
    "control characters in the path": b"GET /\x01 HTTP/1.1\r\nHost: x\r\n\r\n",
    "control characters in the query": b"GET /generate?method=\x7f HTTP/1.1\r\nHost: x\r\n\r\n",
    "a path that is not ASCII": b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
    "a space in a header's name": head(b"X Y: z"),
    "a header without a colon": head(b"nothing"),
    "NUL in a header": head(b"X-A: \x00"),
    "a folded header": head(b"X-A: a", b" b"),
    "a bare CR": head(b"X-A: a\rb"),
    "a negative length": head(b"Content-Length: -1"),
    "a length that is no number": head(b"Content-Length: 1e3"),
    "two lengths": head(b"Content-Length: 3", b"Content-Length: 4"),
    "a length beyond 64 bits": head(b"Content-Length: 99999999999999999999999"),
    "a length and chunks": head(b"Content-Length: 3", b"Transfer-Encoding: chunked"),
    "an encoding that does not end in chunked": head(
        b"Transfer-Encoding: chunked, identity", start=b"POST /generate HTTP/1.1"
    ),
    "a chunk size that is no number": head(
        b"Content-Type: application/json",
        b"Transfer-Encoding: chunked",
        start=b"POST /generate HTTP/1.1",
    )
    + b"xyz\r\n",
    "CONNECT": b"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org\r\n\r\n",
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
def test_what_is_no_request_is_refused_in_our_words(address, data):
    with Client(address) as client:
        client.send(data)
        [answer] = client.until_closed()
    assert answer.status == 400
    assert answer.error_type == "BadRequestError"
    assert answer.headers["connection"] == "close"
    assert answer.headers["content-type"] == "application/json"
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])
    assert len(answer.body) <= 2048
    assert_still_works(address)


LARGE = {
    "10,000 headers": head(*[b"X-%d: y" % i for i in range(10_000)]),
    "one header too many": head(*[b"X: y"] * MAX_HEADERS),  # Host is one, too
    "a header of 1 MB": head(b"X: " + b"y" * 2**20),
    "a header's name of 1 MB": head(b"x" * 2**20 + b": y"),
    "a path of 1 MB": head(start=b"GET /" + b"a" * 2**20 + b" HTTP/1.1"),
    "a method of 1 MB": head(start=b"POST /generate?method=" + b"a" * 2**20 + b" HTTP/1.1"),
    "a version of 1 MB": head(start=b"POST /generate?version=" + b"a" * 2**20 + b" HTTP/1.1"),
    "an endless header": b"GET / HTTP/1.1\r\nX: " + b"y" * 2**20,
    "an endless path": b"GET /" + b"y" * 2**20,
    "endless empty lines": b"\r\n" * 2**19,
}


@pytest.mark.parametrize("data", LARGE.values(), ids=LARGE)
def test_a_head_has_its_limits(address, data):
    with Client(address) as client:
        client.send(data)
        [answer] = client.until_closed()
    assert (answer.status, answer.error_type) == (431, "HeadTooLargeError")
    assert len(answer.body) <= 2048
    assert_still_works(address)


def test_a_head_within_the_limits_is_taken(address):
    names = [b"X-%d: y" % i for i in range(MAX_HEADERS - 2)]
    for lines in (names, [b"X: " + b"y" * (MAX_HEAD_BYTES - 100)]):
        with Client(address) as client:
            client.send(head(*lines, b"Connection: close"))
            assert [answer.status for answer in client.until_closed()] == [200]


@pytest.mark.parametrize("data", [b"GET / HT", b"POST /generate HTTP/1.1\r\nX-A: ", b"\r\n"])
def test_a_head_that_does_not_end_is_refused_in_time(impatient, data):
    with Client(impatient) as client:
        client.send(data)
        [answer] = client.until_closed()
    assert (answer.status, answer.error_type) == (408, "RequestTimeoutError")


def test_a_head_that_comes_byte_by_byte_is_refused_in_time(impatient):
    with Client(impatient) as client:
        client.socket.settimeout(0.05)
        received, whole, num_sent = b"", head(*[b"X-%d: y" % i for i in range(100)]), 0
        # A byte sent while the server closes resets the connection, and may take the answer along.
        with contextlib.suppress(ConnectionError):
            for byte in whole:
                num_sent += 1
                client.socket.sendall(bytes([byte]))
                with contextlib.suppress(TimeoutError):
                    part = client.socket.recv(65536)
                    received += part
                    if not part:
                        break
    assert num_sent < len(whole)
    assert all(answer.status == 408 for answer in answers(received))


def test_who_asks_for_nothing_is_let_go(impatient):
    with Client(impatient) as client:
        assert client.until_closed() == []


@pytest.mark.parametrize("sent", [b"", b'{"prompt":', BODY[:-1]])
def test_a_body_that_does_not_end_is_refused_in_time(impatient, sent):
    with Client(impatient) as client:
        client.send(POST + sent)
        [answer] = client.until_closed()
    assert (answer.status, answer.error_type) == (408, "RequestTimeoutError")


def test_a_refusal_does_not_wait_for_the_body(address):
    with Client(address) as client:
        client.send(POST.replace(b"/generate", b"/nothing") + BODY[:3])
        assert client.socket.recv(4096).startswith(b"HTTP/1.1 404")


def test_requests_in_one_go_are_answered_in_order(address):
    last = GET.replace(b"Host: x", b"Connection: close")
    with Client(address) as client:
        client.send(POST + BODY + GET + POST.replace(b"/generate", b"/nothing") + BODY + last)
        given = client.until_closed()
    assert [answer.status for answer in given] == [200, 200, 404, 200]
    assert orjson.loads(given[0].body)["text"] == "Once upon a time"


def test_a_thousand_requests_in_one_go_get_the_answers_to_the_first_few(address):
    with Client(address) as client:
        client.send(GET * 1000)
        given = client.until_closed()
    assert 1 <= len(given) <= 20
    assert {answer.status for answer in given} == {200}
    assert_still_works(address)


def test_garbage_behind_a_request_does_not_spoil_its_answer(engine, address, monkeypatch):
    monkeypatch.setattr(engine, "step_s", 0.05)
    stream = b'{"prompt": "p", "stream": true}'
    with Client(address) as client:
        client.send(POST.replace(b"15", b"%d" % len(stream)) + stream + b"\x00garbage\r\n\r\n")
        [answer] = client.until_closed()
    assert answer.status == 200
    assert answer.body.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("stream", [False, True])
def test_who_sends_no_more_is_gone_and_what_ran_is_aborted(engine, address, monkeypatch, stream):
    """A client that closes its half cannot be told from one that left."""
    wait_until(lambda: engine.num_running == 0)
    monkeypatch.setattr(engine, "step_s", 5)
    before = engine.num_aborted
    body = BODY if not stream else b'{"prompt": "p", "stream": true}'
    with Client(address) as client:
        client.send(POST.replace(b"15", b"%d" % len(body)) + body)
        wait_until(lambda: engine.num_running == 1)
        client.socket.shutdown(socket.SHUT_WR)
        wait_until(lambda: engine.num_aborted == before + 1)
    wait_until(lambda: engine.num_running == 0)


@pytest.mark.parametrize("protocol", [b"websocket", b"h2c", b"x"])
def test_an_upgrade_is_not_taken_up(address, protocol):
    with Client(address) as client:
        offer = head(b"Connection: Upgrade", b"Upgrade: " + protocol)
        last = head(b"Connection: close, Upgrade", b"Upgrade: " + protocol)
        client.send(offer + GET + offer + last)
        assert [answer.status for answer in client.until_closed()] == [200] * 4


@pytest.mark.parametrize("cut", [0, 5, len(BODY)])
def test_a_request_that_offers_an_upgrade_keeps_its_body(address, cut):
    with Client(address) as client:
        offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMA"
        client.send(POST.replace(b"Host: x", offer) + BODY[:cut])
        time.sleep(0.05)  # so that the rest comes by itself
        client.send(BODY[cut:] + GET.replace(b"Host: x", b"Connection: close"))
        given = client.until_closed()
    assert orjson.loads(given[0].body)["text"] == "Once upon a time"
    assert given[1].status == 200


def test_expecting_to_be_told_to_go_on_is_told_so(address):
    with Client(address) as client:
        client.send(POST.replace(b"Host: x", b"Expect: 100-continue"))
        assert client.socket.recv(4096).startswith(b"HTTP/1.1 100")
        client.send(BODY)
        assert client.socket.recv(4096).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "path",
    [
        "/generate/",
        "//generate",
        "/GENERATE",
        "/generate;x",
        "/generate%00",
        "/generate/../generate",
        "/./generate",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/..%2f..%2fetc%2fpasswd",
        "/static/../../etc/passwd",
        "/docs/../generate",
        "*",
    ],
)
def test_a_path_is_a_route_only_if_it_is_spelt_as_one(address, path):
    with Client(address) as client:
        client.send(b"POST " + path.encode() + POST.removeprefix(b"POST /generate") + BODY)
        received = client.socket.recv(4096)
    [answer] = answers(received)
    assert (answer.status, answer.error_type) == (404, "NotFoundError")
    assert b"passwd" not in answer.body


def test_answers_without_an_application_are_counted_and_logged(address, caplog):
    caplog.set_level("INFO", "service.access")

    def count(code: int) -> float:
        text = httpx.get(address + "/metrics").text
        found = re.search(rf'http_requests_total{{code="{code}",route="<none>"}} (\S+)', text)
        return float(found[1]) if found else 0.0

    before = count(400)
    with Client(address) as client:
        client.send(b"hello\r\n\r\n")
        [answer] = client.until_closed()
    assert count(400) == before + 1
    logged = [vars(record).get("request_id") for record in caplog.records]
    assert answer.headers["x-request-id"] in logged
