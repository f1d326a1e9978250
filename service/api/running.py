"""Requests under way, by the ids their clients know, and ``POST /requests/{id}/cancel``."""

from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager

from fastapi import APIRouter, Request
from pydantic import BaseModel

from service.api.errors import documented_errors
from service.engine.engine import Engine
from service.engine.generation import Generation, GenerationRequest
from service.errors import NotFoundError
from service.tracing import Followed, traced

router = APIRouter(tags=["operations"])
_MAX_ECHO = 64  # characters of a client's spelling repeated in an error


class Cancelled(BaseModel):
    """A request that was ended early."""

    id: str
    cancelled: bool


class RunningRequests:
    """Generations under way; several may share an id, because clients choose ``X-Request-Id``."""

    def __init__(self) -> None:
        self._generations: dict[str, list[Generation]] = {}

    @contextmanager
    def registered(self, ids: Iterable[str], generation: Generation) -> Iterator[None]:
        """Let the generation be found by each of its ids."""
        names = set(ids)
        for name in names:
            self._generations.setdefault(name, []).append(generation)
        try:
            yield
        finally:
            for name in names:
                self._generations[name].remove(generation)
                if not self._generations[name]:
                    del self._generations[name]

    def cancel(self, request_id: str) -> bool:
        """End what has this id; False if nothing has."""
        found = self._generations.get(request_id, [])
        for generation in found:
            generation.cancel()
        return bool(found)


@asynccontextmanager
async def running(
    request: Request, engine: Engine, work: GenerationRequest
) -> AsyncIterator[Followed]:
    """Hand work to the engine, to be found under its own id and the request's, and traced.

    Leaving the context aborts what still runs.
    """
    ids = (work.request_id, request.state.response_headers["X-Request-Id"])
    registry: RunningRequests = request.app.state.running
    with traced(work, engine.model_name) as trace:
        async with await engine.submit(work) as generation:
            with registry.registered(ids, generation):
                yield trace.follow(generation)


@router.post("/requests/{request_id}/cancel", responses=documented_errors(401, 404))
async def cancel(request_id: str, request: Request) -> Cancelled:
    """End a running request: its answer has what it generated so far, and the reason `abort`.

    The id is the answer's, or the `X-Request-Id` that the request was sent with.
    """
    registry: RunningRequests = request.app.state.running
    if not registry.cancel(request_id):
        raise NotFoundError(
            f"No request with the id {request_id[:_MAX_ECHO]!r} is running.", "request_id"
        )
    return Cancelled(id=request_id[:128], cancelled=True)
