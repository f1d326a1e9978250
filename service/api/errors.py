"""The one shape of every refusal, and the one table from error classes to statuses.

ServiceError (service/errors.py)
├── BadRequestError
│   ├── BodyTooLargeError      the body is longer than the server takes
│   ├── HeadTooLargeError      the request line and the headers are
│   ├── RequestTimeoutError    the request took too long to arrive
│   └── ClientGoneError        the client left; nobody reads this answer
"""

import logging

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from service.errors import (
    BadRequestError,
    NotFoundError,
    QueueFullError,
    ServiceError,
    UnauthorizedError,
    UnavailableError,
)
from sparse_methods import (
    InvalidKnobsError,
    SparseMethodError,
    UnknownMethodError,
    UnknownVersionError,
    UnsupportedError,
)

_log = logging.getLogger(__name__)
_MAX_MESSAGE_BYTES = 800  # the whole body stays below 2 kB even if every byte is escaped
_MAX_PARAM_CHARACTERS = 64
_INTERNAL_MESSAGE = "The server failed; it is not your mistake. The log names the request id."


class BodyTooLargeError(BadRequestError):
    """The request body is longer than the server takes."""


class HeadTooLargeError(BadRequestError):
    """The request line and the headers are longer than the server takes."""


class RequestTimeoutError(BadRequestError):
    """The request took too long to arrive."""


class ClientGoneError(BadRequestError):
    """The client left before its answer was ready; the answer only ends the request."""


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str = Field(description="What was given, what is allowed, what to try.")
    type: str = Field(description="Class of the error.")
    param: str | None = Field(description="Request field at fault, if one is.")
    code: int = Field(description="HTTP status.")


class ErrorResponse(BaseModel):
    """Every answer that is not a success."""

    error: ErrorDetail


_STATUSES: tuple[tuple[type[Exception], int], ...] = (  # the first class that fits decides
    (BodyTooLargeError, 413),
    (HeadTooLargeError, 431),
    (RequestTimeoutError, 408),
    (ClientGoneError, 499),
    (BadRequestError, 400),
    (UnauthorizedError, 401),
    (NotFoundError, 404),
    (QueueFullError, 429),
    (UnavailableError, 503),
    (SparseMethodError, 400),
    (ClientDisconnect, 499),
)
_TYPES = {
    400: "BadRequestError",
    401: "UnauthorizedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "PayloadTooLargeError",
    429: "TooManyRequestsError",
    431: "HeadTooLargeError",
    499: "ClientGoneError",
    503: "ServiceUnavailableError",
}
_HEADERS = {
    401: {"WWW-Authenticate": "Bearer"},
    408: {"Connection": "close"},
    413: {"Connection": "close"},  # what is left of the body is not read
    429: {"Retry-After": "1"},
    500: {"X-Should-Retry": "false"},  # or OpenAI's clients would send the same request thrice
    503: {"Retry-After": "5"},
}
_PARAMS: tuple[tuple[type[Exception], str], ...] = (
    (UnknownMethodError, "method"),
    (UnknownVersionError, "version"),
    (InvalidKnobsError, "method_params"),
    (UnsupportedError, "method_params"),  # of a request: knobs that this server cannot serve
    (SparseMethodError, "method"),
)


def describe_error(error: Exception) -> ErrorResponse:
    """What a client may know of an error; the text of an unexpected one stays in the log."""
    status = next((code for cls, code in _STATUSES if isinstance(error, cls)), 500)
    param = getattr(error, "param", None)
    if param is None:
        param = next((name for cls, name in _PARAMS if isinstance(error, cls)), None)
    is_ours = isinstance(error, (ServiceError, SparseMethodError))
    return _detail(status, str(error) if is_ours else _INTERNAL_MESSAGE, param)


def error_response(error: Exception) -> Response:
    """The answer to a request that ended in ``error``."""
    return _response(describe_error(error), getattr(error, "retry_after_s", None))


def install_error_handlers(app: FastAPI) -> None:
    """Give every error of the application, the router's own included, the one shape."""
    for cls in (ServiceError, SparseMethodError, ClientDisconnect):
        app.add_exception_handler(cls, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_validation_error)
    app.add_exception_handler(HTTPException, _answer_http_exception)


def documented_errors(*statuses: int) -> dict[int | str, dict[str, object]]:
    """The OpenAPI entries of error answers."""
    entries: dict[int | str, dict[str, object]] = {
        status: {"model": ErrorResponse, "description": _TYPES.get(status, "InternalServerError")}
        for status in statuses
    }
    # Without a default FastAPI would document its 422, which nobody ever gets.
    return entries | {"default": {"model": ErrorResponse, "description": "Any other error"}}


async def _answer_error(_request: Request, error: Exception) -> Response:
    body = describe_error(error)
    if body.error.code == 500:
        _log.error("request failed", exc_info=error)
    return _response(body, getattr(error, "retry_after_s", None))


async def _answer_validation_error(_request: Request, error: Exception) -> Response:
    """Remap FastAPI's 422; only path and query parameters are validated by FastAPI here."""
    first = error.errors()[0] if isinstance(error, RequestValidationError) else {}
    param = ".".join(str(part) for part in first.get("loc", ())[1:])
    return _response(_detail(400, f"Invalid parameter {param!r}: {first.get('msg')}.", param))


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    detail = str(error.detail) if isinstance(error, HTTPException) else _INTERNAL_MESSAGE
    if status == 404:
        detail = "There is no such route; GET /openapi.json lists them."
    if status == 405:
        detail = f"This route does not take {request.method[:16]}."
    response = _response(_detail(status, detail, None))
    response.headers.update(getattr(error, "headers", None) or {})
    return response


def _detail(status: int, message: str, param: str | None) -> ErrorResponse:
    return ErrorResponse(
        error=ErrorDetail(
            message=_bounded(message),
            type=_TYPES.get(status, "InternalServerError" if status >= 500 else "BadRequestError"),
            param=None if param is None else param[:_MAX_PARAM_CHARACTERS],
            code=status,
        )
    )


def _response(body: ErrorResponse, retry_after_s: int | None = None) -> Response:
    status = body.error.code
    headers = dict(_HEADERS.get(status, {}))
    if retry_after_s is not None:
        headers["Retry-After"] = str(retry_after_s)
    return Response(orjson.dumps(body.model_dump()), status, headers, "application/json")


def _bounded(message: str) -> str:
    """Cut a message so that it can neither be long nor break a log or a terminal."""
    printable = "".join(char if char.isprintable() else "?" for char in message[:2000])
    cut = printable.encode("utf-8", "replace")
    if len(cut) <= _MAX_MESSAGE_BYTES:
        return cut.decode()
    return cut[: _MAX_MESSAGE_BYTES - 3].decode("utf-8", "ignore") + "..."
