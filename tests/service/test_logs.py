"""One JSON object per line, and never a client's text."""

import io
import logging
import sys
from typing import Any

import orjson
import pytest

from service.logs import JsonFormatter, configure_logging
from tests.service.fake_engine import FakeEngine, http_client

PRIVATE = "the-prompt-nobody-may-log"


@pytest.fixture
def log():
    root = logging.getLogger()
    before, level = root.handlers, root.level
    stream = io.StringIO()
    configure_logging("debug", stream)
    yield stream
    root.handlers, root.level = before, level


def lines(log: io.StringIO) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in log.getvalue().splitlines()]


def record_of(error: Exception) -> dict[str, Any]:
    try:
        raise error
    except type(error):
        record = logging.LogRecord("x", logging.ERROR, "", 0, "failed", None, None)
        record.exc_info = sys.exc_info()
    text = JsonFormatter().format(record)
    assert "\n" not in text
    entry: dict[str, Any] = orjson.loads(text)
    return entry


def test_a_record_is_one_line_with_its_extra_fields(log: io.StringIO) -> None:
    logging.getLogger("some.logger").warning("two\nlines", extra={"request_id": "r1"})
    (entry,) = (line for line in lines(log) if line["logger"] == "some.logger")
    assert entry["message"] == "two\nlines"
    assert entry["level"] == "warning"
    assert entry["request_id"] == "r1"
    assert entry["time"].endswith("+00:00")


def test_an_exception_that_may_quote_input_keeps_its_words_to_itself() -> None:
    entry = record_of(ValueError(PRIVATE))
    assert entry["error"] == "ValueError"
    assert "record_of" in entry["frames"][-1]
    assert PRIVATE not in str(entry)


def test_an_exception_of_the_machine_is_told_in_full() -> None:
    assert record_of(RuntimeError("CUDA out of memory"))["error_message"] == "CUDA out of memory"


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_requests_are_logged_without_any_of_their_text(log: io.StringIO) -> None:
    engine = FakeEngine()
    async with http_client(engine) as client:
        body = {"prompt": PRIVATE, "method_params": {"window_blocks": 2}}
        await client.post("/generate", json=body, headers={"X-Request-Id": "r-1"})
        await client.post("/generate?method=" + PRIVATE, json=body)
        await client.get("/" + PRIVATE)
        engine.refusal = KeyError(PRIVATE)
        await client.post("/generate", json=body)
    # httpx logs its own requests in this process; only the server's lines are looked at.
    entries = [line for line in lines(log) if line["logger"].startswith("service")]
    assert PRIVATE not in str(entries)
    access = [entry for entry in entries if entry["logger"] == "service.access"]
    assert [(entry["route"], entry["status"]) for entry in access] == [
        ("/generate", 200),
        ("/generate", 400),
        ("<none>", 404),
        ("/generate", 500),
    ]
    assert access[0]["request_id"] == "r-1"
    assert [entry["error"] for entry in entries if "error" in entry] == ["KeyError"]
