"""Work that ends when its client leaves, and server-sent events."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterable, Coroutine, Iterable
from typing import Any, Protocol, TypeVar

import orjson
from fastapi import Response
from starlette.types import Receive, Scope, Send
from typing_extensions import override

from service.api.errors import ClientGoneError, describe_error
from service.api.middleware import SEND_OF_SERVER
from service.engine.sequence import Update

Result = TypeVar("Result")
_log = logging.getLogger(__name__)
_DONE = b"data: [DONE]\n\n"


def as_json(content: object) -> bytes:
    """Encode an answer or an event; the thresholds in it may be keyed by lengths, which are int."""
    return orjson.dumps(content, option=orjson.OPT_NON_STR_KEYS)


async def unless_client_leaves(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Run ``work`` to its end, or cancel it as soon as the client disconnects.

    ASGI tells of a disconnect only who listens; a handler that awaits something else runs on.

    Raises:
        ClientGoneError: The client left first.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError("The client left.")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


class EventWriter(Protocol):
    """Turns what the engine says into the events of one route."""

    def write(self, index: int, update: Update) -> Iterable[object]:
        """Events of an update of choice ``index``; JSON values."""
        ...

    def close(self) -> Iterable[object]:
        """Events behind those of the last update."""
        ...


class EventStream(Response):
    """Sends server-sent events, then ``[DONE]``; stops when the client leaves.

    All of a token's way through this layer is the loop in ``_send_all``: at 64 streams each frame
    between the engine and the socket is paid for thousands of times a second.
    """

    media_type = "text/event-stream"

    def __init__(self, updates: AsyncIterable[tuple[int, Update]], writer: EventWriter) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._updates = updates
        self._writer = writer

    @override
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = self.raw_headers
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        # Whatever wraps ``send`` on the way to here looks at the start of an answer only.
        send = scope.get("state", {}).get(SEND_OF_SERVER, send)
        with contextlib.suppress(ClientGoneError):
            await unless_client_leaves(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        write = self._writer.write
        try:
            async for index, update in self._updates:
                events = _as_events(write(index, update))
                if events:
                    await send({"type": "http.response.body", "body": events, "more_body": True})
            end = _as_events(self._writer.close())
        except Exception as error:  # noqa: BLE001 - the status is out; say it in the stream
            answer = describe_error(error)
            if answer.error.code == 500:
                _log.exception("a stream failed")
            end = _as_events([answer.model_dump()])
        await send({"type": "http.response.body", "body": end + _DONE, "more_body": False})


def _as_events(values: Iterable[object]) -> bytes:
    return b"".join([b"data: " + as_json(value) + b"\n\n" for value in values])


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
