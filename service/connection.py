"""One connection, kept within limits that uvicorn leaves to a proxy in front of it.

Who sends a request or reads its answer too slowly is let go, who sends no request or one with too
much of a head is refused in the shape of every other error, and connections beyond the limit are
only good for probes, which must be answered most of all when everything else is full.
"""

import asyncio
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import httptools
from typing_extensions import override
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from service.api.errors import HeadTooLargeError, RequestTimeoutError, error_response
from service.api.middleware import NO_ROUTE, OVER_LIMIT
from service.errors import BadRequestError, ServiceError
from service.settings import Settings

_access_log = logging.getLogger("service.access")
MAX_HEAD_BYTES = 2**16  # of the request line and the headers together
MAX_HEADERS = 128
_MAX_PIPELINED = 16  # requests that wait behind the one being answered
_NUM_FOR_PROBES = 64  # connections beyond the limit
_GRACE_S = 5.0  # the application times a body, too, and answers; the connection does not


@dataclass(frozen=True)
class Limits:
    """What a client may take.

    Attributes:
        timeout_s: Most seconds for the head of a request, for its body, and to read on.
        count: Called with route and status of an answer that no application gives.
    """

    max_connections: int
    timeout_s: float
    count: Callable[[str, int], None]


def limited_connections(
    settings: Settings, count: Callable[[str, int], None]
) -> type[HttpToolsProtocol]:
    """The protocol that a server of these settings speaks."""

    class LimitedConnection(Connection):
        limits = Limits(settings.max_connections, settings.client_timeout_s, count)

    return LimitedConnection


class Connection(HttpToolsProtocol):
    """uvicorn's protocol with limits; ``limited_connections`` sets them."""

    limits: ClassVar[Limits]

    _read_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _refusal: ServiceError | None = None  # why the parser was stopped
    _is_deaf = False  # what still comes is thrown away
    _is_in_body = False
    _num_head_bytes = 0  # of a head that is not complete
    _num_messages = 0

    # What asyncio calls --------------------------------------------------------------------------

    @override
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        num_over = len(self.connections) - self.limits.max_connections
        if num_over > _NUM_FOR_PROBES:
            self._is_deaf = True
            transport.abort()
            return
        if num_over > 0:
            self.app_state = {**self.app_state, OVER_LIMIT: True}
        self._await_head()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_read_timer()
        self._stop_write_timer()
        super().connection_lost(exc)

    @override
    def data_received(self, data: bytes) -> None:
        if self._is_deaf:
            return
        self._unset_keepalive_if_required()
        num_messages = self._num_messages
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            self._decline(data[offer.args[0] :])
        except httptools.HttpParserError:
            self._refuse(self._refusal or BadRequestError("This is no valid HTTP/1.1 request."))
        if num_messages == self._num_messages:
            self._count_head(len(data))

    @override
    def pause_writing(self) -> None:
        super().pause_writing()
        self._stop_write_timer()
        self._write_timer = self.loop.call_later(self.limits.timeout_s, self.transport.abort)

    @override
    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_write_timer()

    # What the parser calls -----------------------------------------------------------------------

    @override
    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        if len(self.headers) > MAX_HEADERS:
            self._stop_parser(HeadTooLargeError(f"There are more than {MAX_HEADERS} headers."))

    @override
    def on_headers_complete(self) -> None:
        if self.parser.get_method() == b"CONNECT":
            self._stop_parser(BadRequestError("This server is no proxy."))
        if self.parser.get_http_version() not in {"1.0", "1.1"}:
            self._stop_parser(BadRequestError("Only HTTP/1.0 and HTTP/1.1 are spoken here."))
        num_bytes = len(self.url) + sum(len(n) + len(v) for n, v in self.headers)
        if num_bytes > MAX_HEAD_BYTES:
            self._stop_parser(_head_too_large())
        if len(self.pipeline) >= _MAX_PIPELINED:
            self._stop_parser(BadRequestError("Too many requests came before the first answer."))
        if self.parser.should_upgrade():
            return
        self._is_in_body = True
        self._num_head_bytes = 0
        self._await_body()
        super().on_headers_complete()

    @override
    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return  # the parser takes no body after an offer
        self._is_in_body = False
        self._num_messages += 1
        self._stop_read_timer()
        super().on_message_complete()

    # ---------------------------------------------------------------------------------------------

    def _decline(self, rest: bytes) -> None:
        """Read a request again without its offer to speak another protocol.

        Some clients offer HTTP/2 with every request, and send its body behind the offer.
        """
        version = self.parser.get_http_version().encode()
        lines = [self.parser.get_method() + b" " + self.url + b" HTTP/" + version]
        for name, value in self.headers:
            kept = value
            if name == b"connection":
                tokens = [token.strip() for token in value.split(b",")]
                kept = b", ".join(token for token in tokens if token.lower() == b"close")
            if kept and name not in {b"upgrade", b"http2-settings"}:
                lines.append(name + b": " + kept)
        self.parser = httptools.HttpRequestParser(self)
        self.data_received(b"\r\n".join([*lines, b"", b""]) + rest)

    @property
    def _cycle(self) -> RequestResponseCycle | None:
        """The last request; None before the first, which uvicorn's types do not know."""
        return self.cycle

    def _count_head(self, num_bytes: int) -> None:
        """Bytes came that complete no head; a parser that gathers them sets no limit."""
        if self._is_deaf or self._is_in_body:
            return
        self._num_head_bytes += num_bytes
        if self._num_head_bytes > MAX_HEAD_BYTES:
            self._refuse(_head_too_large())
        elif self._read_timer is None:
            self._await_head()

    def _stop_parser(self, refusal: ServiceError) -> None:
        self._refusal = refusal
        raise refusal  # the parser stops, and calls it an error of its own

    def _refuse(self, error: ServiceError) -> None:
        """Answer what is no request and close; an answer that is on its way is sent first."""
        self._is_deaf = True
        self._stop_read_timer()
        cycle = self._cycle
        if cycle is not None and not cycle.response_complete:
            if not cycle.more_body or cycle.response_started or self.pipeline:
                cycle.keep_alive = False
                return
            cycle.disconnected = True  # the application would wait for the rest of the body
            cycle.message_event.set()
        response, request_id = error_response(error), secrets.token_hex(16)
        headers = [*response.raw_headers, (b"x-request-id", request_id.encode())]
        headers = [header for header in headers if header[0] != b"connection"]
        head = b"".join(name + b": " + value + b"\r\n" for name, value in headers)
        status_line = STATUS_LINE[response.status_code]
        body = bytes(response.body)
        self.transport.write(status_line + head + b"connection: close\r\n\r\n" + body)
        self.transport.close()
        self.limits.count(NO_ROUTE, response.status_code)
        fields = {"request_id": request_id, "route": NO_ROUTE, "status": response.status_code}
        _access_log.info("request", extra=fields)

    def _await_head(self) -> None:
        self._stop_read_timer()
        self._read_timer = self.loop.call_later(self.limits.timeout_s, self._end_head)

    def _end_head(self) -> None:
        self._read_timer = None
        if self._cycle is None and not self._num_head_bytes:
            self.transport.close()  # nobody asked for anything
            return
        limit = f"{self.limits.timeout_s:g} s"
        self._refuse(RequestTimeoutError(f"The head of the request took more than {limit}."))

    def _await_body(self) -> None:
        self._stop_read_timer()
        limit_s = self.limits.timeout_s + _GRACE_S
        self._read_timer = self.loop.call_later(limit_s, self._end_body)

    def _end_body(self) -> None:
        self._read_timer = None
        if self.flow.read_paused:  # we do not listen: it is not the client who is slow
            self._await_body()
        else:
            self.transport.close()

    def _stop_read_timer(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None


def _head_too_large() -> HeadTooLargeError:
    return HeadTooLargeError(
        f"The request line and the headers are larger than the {MAX_HEAD_BYTES} bytes allowed."
    )
