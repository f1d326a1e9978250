"""One JSON object per line, and never a client's text."""

import io
import logging
import sys
from typing import Any

import orjson
import pytest

from service.logs import JsonFormatter, TextFormatter, configure_logging
from tests.service.fake_engine import FakeEngine, http_client

PRIVATE = "the-prompt-nobody-may-log"


@pytest.fixture
def log():
    root = logging.getLogger()
    before, level = root.handlers, root.level
    stream = io.StringIO()
    configure_logging("debug", stream)
    yield stream
    root.handlers = before
    root.setLevel(level)


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


def test_a_line_for_people_says_the_same_on_one_line() -> None:
    record = logging.makeLogRecord(
        {
            "name": "a.b",
            "levelname": "INFO",
            "msg": "two\nlines",
            "route": "/x\x1b[2J",
            "status": 200,
        }
    )
    text = TextFormatter().format(record)
    assert text.endswith("info    two\\nlines logger=a.b route=/x\\x1b[2J status=200")
    assert text.isprintable()


def test_the_style_is_chosen_when_the_log_is_configured(log: io.StringIO) -> None:
    configure_logging("info", log, "text")
    logging.getLogger("a").info("hello", extra={"seconds": 2})
    assert log.getvalue().endswith("info    hello logger=a seconds=2\n")


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_what_machines_ask_all_the_time_is_logged_for_debugging_only(
    log: io.StringIO,
) -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with http_client(FakeEngine()) as client:
        for path in ("/health", "/health/live", "/health/ready", "/metrics"):
            await client.get(path)
        await client.get("/version", headers={"traceparent": parent})
        await client.get("/version")
        await client.get("/version", headers={"traceparent": "00-" + "x" * 32})
    access = [line for line in lines(log) if line["logger"] == "service.access"]
    assert [line["level"] for line in access] == ["debug"] * 4 + ["info"] * 3
    assert [line.get("trace_id") for line in access[-3:]] == [
        "0af7651916cd43dd8448eb211c80319c",
        None,
        None,
    ]
