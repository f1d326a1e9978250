"""What every request passes: an id, a line in the log, a count, and the check of its API key.

Plain ASGI: Starlette's BaseHTTPMiddleware costs a task per request and hides disconnects.
"""

import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.errors import error_response
from service.errors import QueueFullError, UnauthorizedError
from service.logs import current_request_id, current_trace_id
from service.tracing import Caller, Tracing, current_caller

_access_log = logging.getLogger("service.access")
_log = logging.getLogger(__name__)
_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
OVER_LIMIT = "is_over_limit"  # in the state of connections that are only good for probes
SEND_OF_SERVER = "send_of_server"  # in the state: what is below all middleware
NO_ROUTE = "<none>"  # never the raw path: it is the client's text
_TRACE_PARENT = re.compile(r"00-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")
_TRACE_HEADERS = ("traceparent", "tracestate")
_ASKED_BY_MACHINES = {"/health", "/health/live", "/health/ready", "/metrics"}


class RequestContext:
    """Names the request, adds the headers collected on the way, counts and logs its end."""

    def __init__(
        self, app: ASGIApp, count: Callable[[str, int], None], tracing: Tracing | None = None
    ) -> None:
        self._app = app
        self._count = count
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope)
        given_id = given.get("x-request-id", "")
        request_id = given_id if _SANE_REQUEST_ID.fullmatch(given_id) else secrets.token_hex(16)
        headers = {"X-Request-Id": request_id}
        scope.setdefault("state", {}).update({"response_headers": headers, SEND_OF_SERVER: send})
        started_at, status = time.monotonic(), 0
        context = current_request_id.set(request_id)
        # A task serves the requests of a connection one after the other: each sets what is its own.
        parent = _TRACE_PARENT.fullmatch(given.get("traceparent", ""))
        current_trace_id.set(parent[1] if parent else None)
        if self._tracing is not None:
            trace_headers = {name: given[name] for name in _TRACE_HEADERS if name in given}
            current_caller.set(Caller(self._tracing, scope["path"], trace_headers))

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(headers)
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception as error:  # noqa: BLE001 - the outermost frame of a request
            _log.exception("request failed")
            if status == 0:
                await error_response(error)(scope, receive, send_with_headers)
        finally:
            self._record(scope, status, time.monotonic() - started_at)
            current_request_id.reset(context)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", NO_ROUTE)
        status = status or 499  # the client left before an answer began
        self._count(route, status)
        fields = {
            "http_method": scope["method"][:16],
            "route": route,
            "status": status,
            "duration_s": round(seconds, 6),
        }
        level = logging.DEBUG if route in _ASKED_BY_MACHINES else logging.INFO
        _access_log.log(level, "request", extra=fields)


class ConnectionLimit:
    """Refuses what comes over a connection beyond the limit, unless its path is a probe's."""

    def __init__(self, app: ASGIApp, allowed_paths: frozenset[str]) -> None:
        self._app = app
        self._allowed_paths = allowed_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        is_over = scope["type"] == "http" and scope["state"].get(OVER_LIMIT, False)
        if is_over and scope["path"] not in self._allowed_paths:
            response = error_response(QueueFullError("Too many connections; retry later."))
            response.headers["Connection"] = "close"
            await response(scope, receive, send)
            return
        await self._app(scope, receive, send)


class ApiKeys:
    """Lets a request in if it shows one of the keys, or if its path is public."""

    def __init__(self, app: ASGIApp, keys: Iterable[str], public_paths: frozenset[str]) -> None:
        self._app = app
        self._digests = [_digest(key) for key in keys]
        self._public_paths = public_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        is_guarded = scope["type"] == "http" and scope["path"] not in self._public_paths
        if is_guarded and not self._is_known(Headers(scope=scope)):
            refusal = UnauthorizedError("Give a valid API key as 'Authorization: Bearer KEY'.")
            await error_response(refusal)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_known(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = _digest(key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", ""))
        # Every key is compared, and digests have one length: time tells nothing about any key.
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return any(matches)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
