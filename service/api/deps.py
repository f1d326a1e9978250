"""What routes depend on; whatever a request owns is acquired and released here."""

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Query, Request

from service.api.holder import EngineHolder
from service.api.running import running
from service.api.schemas import MethodFields, SamplingFields, SchedulingFields
from service.engine.engine import Engine
from service.engine.generation import GenerationRequest
from service.errors import BadRequestError
from service.tracing import Followed
from sparse_methods import SparseAttentionMethod, SparseMethodError, get_sparse_method

_MAX_ECHO = 64  # characters of a client's spelling repeated in an error


@dataclass(frozen=True)
class MethodQuery:
    """Method and version as the URL names them."""

    method: str | None
    version: str | None


@dataclass(frozen=True)
class ChosenMethod:
    """A method with its knobs, and where the client named it: query, body or default."""

    method: SparseAttentionMethod
    resolved_from: str


@dataclass(frozen=True)
class Submission:
    """A request the engine has taken in.

    Attributes:
        id: Names the request in the answer.
    """

    id: str
    engine: Engine
    chosen: ChosenMethod
    generation: Followed


# Dependencies are coroutines, though nothing is awaited: FastAPI sends plain functions to a thread.
async def get_holder(request: Request) -> EngineHolder:
    """The place of the engine, loaded or not."""
    holder: EngineHolder = request.app.state.holder
    return holder


async def get_engine(holder: Annotated[EngineHolder, Depends(get_holder)]) -> Engine:
    """The engine; 503 while it loads."""
    return holder.engine


async def query_method(
    request: Request,
    method: Annotated[str | None, Query(description="Name from GET /methods.")] = None,
    version: Annotated[str | None, Query(description="Version of the method.")] = None,
) -> MethodQuery:
    """Method and version from the URL, each at most once, and nothing else."""
    for name in request.query_params:
        if name not in {"method", "version"}:
            raise BadRequestError(
                f"Unknown query parameter {name[:_MAX_ECHO]!r}. Known: method, version.",
                name[:_MAX_ECHO],
            )
        if len(request.query_params.getlist(name)) > 1:
            raise BadRequestError(f"The query parameter {name!r} is given more than once.", name)
    if method is not None:  # so that a refusal of the body says, too, which method it was for
        with suppress(SparseMethodError):
            _announce(request, get_sparse_method(method, version))
    return MethodQuery(method, version)


HolderDep = Annotated[EngineHolder, Depends(get_holder)]
EngineDep = Annotated[Engine, Depends(get_engine)]
MethodQueryDep = Annotated[MethodQuery, Depends(query_method)]


def choose_method(
    engine: Engine, query: MethodQuery, body: MethodFields, request: Request
) -> ChosenMethod:
    """Resolve the method of a request, and put it into the headers of its answer.

    Raises:
        BadRequestError: Query and body disagree, or the method is for evaluation only.
        SparseMethodError: Method, version or a knob is unknown or invalid.
    """
    name = _agreed("method", query.method, body.method)
    version = _agreed("version", query.version, body.version)
    cls = get_sparse_method(engine.default_method[0] if name is None else name, version)
    if cls.evaluation_only and not engine.settings.allow_evaluation_methods:
        raise BadRequestError(
            f"Method {cls.registered_name!r} costs more than dense attention and exists to be"
            " compared with; this server does not run it. Its operator can allow it with the"
            " setting allow_evaluation_methods.",
            "method",
        )
    _announce(request, cls)
    method = engine.calibrated(cls(body.method_params))
    method.check_servable(engine.settings.block_size)
    if query.method is not None or (query.version is not None and body.method is None):
        return ChosenMethod(method, "query")
    is_in_body = body.method is not None or body.version is not None
    return ChosenMethod(method, "body" if is_in_body else "default")


@asynccontextmanager
async def submit(
    request: Request,
    engine: Engine,
    chosen: ChosenMethod,
    body: SamplingFields,
    prompt: str | list[int],
) -> AsyncIterator[Submission]:
    """Hand a prompt to the engine; leaving the context aborts what still runs."""
    # Only routes whose clients may set them have these fields.
    scheduling: dict[str, Any] = body.model_dump(include=set(SchedulingFields.model_fields))
    work = GenerationRequest(
        request_id=f"gen-{secrets.token_hex(12)}",
        prompt=prompt if isinstance(prompt, str) else None,
        prompt_ids=None if isinstance(prompt, str) else prompt,
        method=chosen.method,
        sampling=body.sampling(),
        n=body.n,
        **scheduling,
    )
    async with running(request, engine, work) as generation:
        yield Submission(work.request_id, engine, chosen, generation)


def _announce(request: Request, cls: type[SparseAttentionMethod]) -> None:
    """Put a method into the headers of the answer."""
    headers = request.state.response_headers
    headers["X-Sparse-Method"] = cls.registered_name
    headers["X-Sparse-Version"] = cls.registered_version


def _agreed(field: str, in_query: str | None, in_body: str | None) -> str | None:
    if in_query is not None and in_body is not None and in_query != in_body:
        raise BadRequestError(
            f"The query says {field}={in_query[:_MAX_ECHO]!r}, but the body says"
            f" {in_body[:_MAX_ECHO]!r}. Give it once, or the same in both.",
            field,
        )
    return in_body if in_query is None else in_query
