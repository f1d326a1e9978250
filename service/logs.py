"""The log: one JSON object or text per line on standard error, and never a client's text.

An exception's own message is kept only if its class tells of the machine; others, a ValueError of
the tokenizer for one, may quote the prompt, so of those only the class and the frames are written.
"""

import logging
import sys
import traceback
from contextvars import ContextVar
from datetime import UTC, datetime
from types import TracebackType
from typing import TextIO

import orjson
from typing_extensions import override

from service.errors import GenerationError, ModelNotSupportedError, UnavailableError

_TELLS_OF_THE_MACHINE = (
    GenerationError,
    ModelNotSupportedError,
    UnavailableError,
    RuntimeError,
    OSError,
    MemoryError,
    ImportError,
)
_STANDARD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "color_message"}
_MAX_FRAMES = 32

# The request being handled, so that every record about it can be found by its id.
current_request_id: ContextVar[str | None] = ContextVar("current_request_id", default=None)
# The trace it is part of, by its header ``traceparent``.
current_trace_id: ContextVar[str | None] = ContextVar("current_trace_id", default=None)


class JsonFormatter(logging.Formatter):
    """Writes a record as one line of JSON; fields given as ``extra`` are keys of it."""

    @override
    def format(self, record: logging.LogRecord) -> str:
        return orjson.dumps(_entry(record), default=repr).decode()


class TextFormatter(logging.Formatter):
    """Writes a record as one line for people: time, level, message, then the fields."""

    @override
    def format(self, record: logging.LogRecord) -> str:
        entry = {key: _on_one_line(value) for key, value in _entry(record).items()}
        head = f"{entry.pop('time')} {entry.pop('level'):7} {entry.pop('message')}"
        return " ".join([head, *(f"{key}={value}" for key, value in entry.items())])


_FORMATTERS = {"json": JsonFormatter, "text": TextFormatter}


def configure_logging(level: str, stream: TextIO | None = None, style: str = "json") -> None:
    """Send every record of this process, uvicorn's included, through the formatter of a style."""
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(_FORMATTERS[style]())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())


def _entry(record: logging.LogRecord) -> dict[str, object]:
    entry: dict[str, object] = {
        "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
        "level": record.levelname.lower(),
        "logger": record.name,
        "message": record.getMessage(),
    }
    for name, current in (("request_id", current_request_id), ("trace_id", current_trace_id)):
        if (value := current.get()) is not None:
            entry[name] = value
    entry |= {key: value for key, value in vars(record).items() if key not in _STANDARD_FIELDS}
    if record.exc_info and record.exc_info[1] is not None:
        entry |= _describe(record.exc_info[1], record.exc_info[2])
    return entry


def _on_one_line(value: object) -> str:
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in str(value))


def _describe(error: BaseException, frames: TracebackType | None) -> dict[str, object]:
    stack = traceback.extract_tb(frames)[-_MAX_FRAMES:]
    description: dict[str, object] = {
        "error": type(error).__name__,
        "frames": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in stack],
    }
    # NotImplementedError and RecursionError are RuntimeErrors too; they quote no input either.
    if isinstance(error, _TELLS_OF_THE_MACHINE) and not isinstance(error, UnicodeError):
        description["error_message"] = str(error)[:2000]
    return description
