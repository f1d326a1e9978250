"""Reading a request body: bounded, strict, and refused in the one shape of errors.

FastAPI's own body handling reads everything first and coerces; this one stops at the limit, takes
no NaN and no name twice, and names the field at fault.
"""

import asyncio
import difflib
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import orjson
from fastapi import Request
from pydantic import BaseModel, ValidationError

from service.api.errors import BodyTooLargeError, RequestTimeoutError
from service.errors import BadRequestError, QueueFullError

Body = TypeVar("Body", bound=BaseModel)
_MAX_NAME_CHARACTERS = 64  # of a client's spelling repeated in an error


class BodyBudget:
    """Memory for the bodies that are being read, over all connections, in bytes."""

    def __init__(self, num_bytes: int) -> None:
        self._num_free = num_bytes

    @contextmanager
    def share(self) -> Iterator[Callable[[int], None]]:
        """Room for one body: what is yielded takes some of it, or raises QueueFullError."""
        num_taken = 0

        def take(num_bytes: int) -> None:
            nonlocal num_taken
            if num_bytes > self._num_free:
                raise QueueFullError("Too many large requests come at once; retry later.")
            self._num_free -= num_bytes
            num_taken += num_bytes

        try:
            yield take
        finally:
            self._num_free += num_taken


def parsed_body(model: type[Body]) -> Callable[[Request], Awaitable[Body]]:
    """Dependency that reads the request body as ``model``."""

    async def parse(request: Request) -> Body:
        limits = request.app.state.settings
        try:
            async with asyncio.timeout(limits.client_timeout_s):
                content = await read_json_object(request, limits.max_body_bytes)
        except TimeoutError:
            limit = f"{limits.client_timeout_s:g} s"
            raise RequestTimeoutError(f"The body took more than {limit} to arrive.") from None
        return validate_body(model, content)

    return parse


def documented_body(model: type[BaseModel]) -> dict[str, Any]:
    """The ``openapi_extra`` of a route whose body ``parsed_body`` reads."""
    schema = model.model_json_schema()
    schema = _inline(schema, schema.pop("$defs", {}))
    content = {"application/json": {"schema": schema}}
    return {"requestBody": {"required": True, "content": content}}


async def read_json_object(request: Request, limit_bytes: int) -> dict[str, Any]:
    """Read a JSON object, giving up as soon as the body exceeds the limit."""
    _check_content_type(request.headers.get("content-type", ""))
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in {"", "identity"}:
        raise BadRequestError("The body must come without a content encoding, as plain JSON.")
    too_large = BodyTooLargeError(f"The body is larger than the {limit_bytes} bytes allowed.")
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared[:20]) > limit_bytes:
        raise too_large
    budget: BodyBudget = request.app.state.body_budget
    body = bytearray()
    with budget.share() as take:
        async for chunk in request.stream():  # a chunked body declares no length
            take(len(chunk))
            body += chunk
            if len(body) > limit_bytes:
                raise too_large
        return _parse_object(bytes(body))


def validate_body(model: type[Body], content: dict[str, Any]) -> Body:
    """Validate a JSON object; the first field at fault is named."""
    # Before pydantic, which would build an error for each of half a million unknown fields.
    unknown = next((name for name in content if name not in model.model_fields), None)
    if unknown is not None:
        raise _unknown_field(model, unknown[:_MAX_NAME_CHARACTERS])
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise _bad_field(error) from None


def _check_content_type(content_type: str) -> None:
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type != "application/json":
        given = repr(media_type[:_MAX_NAME_CHARACTERS]) if media_type else "none"
        raise BadRequestError(f"The content type must be 'application/json', not {given}.")


def _parse_object(body: bytes) -> dict[str, Any]:
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        position = f"line {error.lineno} column {error.colno}"
        raise BadRequestError(f"The body is not valid JSON ({position}): {error.msg}.") from None
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise BadRequestError(f"The body must be a JSON object, not a value of type {kind}.")
    _check_unique_keys(body, content)
    return content


def _check_unique_keys(body: bytes, content: dict[str, Any]) -> None:
    """Refuse an object that says two things of one name; orjson takes the last one.

    Every name has a colon behind it. A body with no other colons is all right as it is; one that
    has more, in texts or inner objects, is read once more.
    """
    if body.count(b":") == len(content):
        return
    try:
        json.loads(body, object_pairs_hook=_unique)
    except RecursionError:
        raise BadRequestError("The body is nested too deeply.") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
        name = name[:_MAX_NAME_CHARACTERS]
        raise BadRequestError(f"The name {name!r} comes twice in one JSON object.", name)
    return content


def _bad_field(error: ValidationError) -> BadRequestError:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    path = ".".join(str(part) for part in first["loc"])[:_MAX_NAME_CHARACTERS]
    name = str(first["loc"][0])[:_MAX_NAME_CHARACTERS] if first["loc"] else None
    return BadRequestError(f"Invalid field {path!r}: {first['msg']}.", name)


def _unknown_field(model: type[BaseModel], name: str) -> BadRequestError:
    nearest = difflib.get_close_matches(name, list(model.model_fields), n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    known = ", ".join(model.model_fields)
    return BadRequestError(f"Unknown field {name!r}.{hint} Known fields: {known}.", name)


def _inline(schema: Any, definitions: dict[str, Any]) -> Any:  # noqa: ANN401 - any JSON
    """Replace references to ``$defs``, which have no place inside of an OpenAPI document."""
    if isinstance(schema, list):
        return [_inline(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inline(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    inlined = {key: _inline(value, definitions) for key, value in schema.items()}
    if "mapping" in inlined.get("discriminator", ()):  # to names that are no more
        del inlined["discriminator"]
    return inlined
