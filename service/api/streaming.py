"""Work that ends when its client leaves, and server-sent events."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

import orjson
from fastapi import Response
from starlette.types import Receive, Scope, Send
from typing_extensions import override

from service.api.errors import ClientGoneError, describe_error

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


class EventStream(Response):
    """Sends JSON values as server-sent events, then ``[DONE]``; stops when the client leaves."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[object]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    @override
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = self.raw_headers
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        with contextlib.suppress(ClientGoneError):
            await unless_client_leaves(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        async for event in self._encoded():
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": _DONE, "more_body": False})

    async def _encoded(self) -> AsyncIterator[bytes]:
        try:
            async for event in self._events:
                yield b"data: " + as_json(event) + b"\n\n"
        except Exception as error:  # noqa: BLE001 - the status is out; say it in the stream
            answer = describe_error(error)
            if answer.error.code == 500:
                _log.exception("a stream failed")
            yield b"data: " + orjson.dumps(answer.model_dump()) + b"\n\n"


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
