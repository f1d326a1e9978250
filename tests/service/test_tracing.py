"""A span says what was asked, what it cost and what attention left out; never any text."""

import http.server
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from service.errors import GenerationError, QueueFullError
from service.settings import Settings
from service.tracing import Tracing
from tests.service.fake_engine import FakeEngine, http_client, running_server, wait_until

pytestmark = pytest.mark.anyio
ROOT = Path(__file__).parent.parent.parent
PRIVATE = "the-prompt-nobody-may-trace"
TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADERS = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01", "tracestate": "vendor=1"}
TRACED = Settings(traces_endpoint="http://127.0.0.1:9/v1/traces")  # nobody listens there


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def spans(monkeypatch) -> InMemorySpanExporter:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(Tracing, "to_otlp", lambda *_: Tracing(provider))
    return exporter


async def test_a_generation_is_one_span_under_its_callers(spans) -> None:
    body = {"prompt": PRIVATE, "max_tokens": 9, "seed": 3, "temperature": 0.5, "n": 2}
    async with http_client(FakeEngine(TRACED)) as client:
        answer = (await client.post("/generate?method=dense", json=body, headers=HEADERS)).json()
    [span] = spans.get_finished_spans()
    assert (span.name, span.kind) == ("text_completion fake", SpanKind.SERVER)
    assert f"{span.context.trace_id:032x}" == TRACE_ID
    assert f"{span.parent.span_id:016x}" == PARENT_ID
    assert span.context.trace_state.get("vendor") == "1"
    assert span.status.status_code is StatusCode.UNSET
    attributes = dict(span.attributes)
    assert (
        attributes.items()
        >= {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.provider.name": "sparseserve",
            "gen_ai.request.model": "fake",
            "gen_ai.request.max_tokens": 9,
            "gen_ai.request.temperature": 0.5,
            "gen_ai.request.seed": 3,
            "gen_ai.request.choice.count": 2,
            "gen_ai.response.id": answer["id"],
            "gen_ai.response.finish_reasons": ("stop", "stop"),
            "gen_ai.usage.input_tokens": 5,
            "gen_ai.usage.output_tokens": 8,
            "gen_ai.latency.time_to_first_token": 0.3,
            "sparseserve.method": "dense",
            "sparseserve.version": "v1",
        }.items()
    )
    for phase in ("prefill", "decode"):
        for name in ("blocks_total", "blocks_selected", "blocks_skipped", "density"):
            assert attributes[f"sparseserve.{phase}.{name}"] == answer["sparsity"][phase][name]
    assert PRIVATE not in span.to_json()


async def test_a_stream_has_its_span_too_and_without_headers_it_is_a_root(spans) -> None:
    async with http_client(FakeEngine(TRACED)) as client:
        await client.post("/generate", json={"prompt": "p", "stream": True})
        await client.get("/version")
    [span] = spans.get_finished_spans()
    assert span.parent is None
    assert span.attributes["gen_ai.response.finish_reasons"] == ("stop",)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_chat_is_an_operation_of_its_own(spans, stream) -> None:
    body = {"messages": [{"role": "user", "content": PRIVATE}], "stream": stream}
    async with http_client(FakeEngine(TRACED)) as client:
        await client.post("/v1/chat/completions?method=dense", json=body, headers=HEADERS)
    [span] = spans.get_finished_spans()
    assert span.name == "chat fake"
    assert span.attributes["gen_ai.operation.name"] == "chat"
    assert span.attributes["sparseserve.method"] == "dense"
    assert span.attributes["gen_ai.usage.output_tokens"] == 4
    assert f"{span.context.trace_id:032x}" == TRACE_ID
    assert PRIVATE not in span.to_json()


async def test_each_prompt_of_a_completion_has_a_span_of_its_own(spans) -> None:
    body = {"prompt": ["a", "b"], "stream": True}
    async with http_client(FakeEngine(TRACED)) as client:
        await client.post("/v1/completions", json=body, headers=HEADERS)
    both = spans.get_finished_spans()
    assert [span.name for span in both] == ["text_completion fake"] * 2
    assert {f"{span.context.trace_id:032x}" for span in both} == {TRACE_ID}
    assert all(span.attributes["gen_ai.usage.output_tokens"] == 4 for span in both)


@pytest.mark.parametrize("stream", [False, True])
async def test_what_the_engine_fails_is_an_error_of_the_span(spans, stream) -> None:
    engine = FakeEngine(TRACED)
    engine.fail_at, engine.failure = 1, GenerationError(PRIVATE)
    async with http_client(engine) as client:
        await client.post("/generate", json={"prompt": "p", "stream": stream})
    [span] = spans.get_finished_spans()
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes["error.type"] == "GenerationError"
    assert "gen_ai.usage.output_tokens" not in span.attributes
    assert PRIVATE not in span.to_json()


async def test_a_refusal_is_one_as_well(spans) -> None:
    engine = FakeEngine(TRACED)
    engine.refusal = QueueFullError("full")
    async with http_client(engine) as client:
        assert (await client.post("/generate", json={"prompt": "p"})).status_code == 429
    [span] = spans.get_finished_spans()
    assert span.attributes["error.type"] == "QueueFullError"


def test_the_span_of_a_client_that_leaves_ends_without_an_end_of_the_generation(spans) -> None:
    engine = FakeEngine(TRACED)
    engine.step_s, engine.words = 0.02, ("word ",) * 1000
    with running_server(engine) as address:
        body = {"prompt": "p", "stream": True}
        with httpx.stream("POST", address + "/generate", json=body) as response:
            next(response.iter_lines())
        wait_until(lambda: len(spans.get_finished_spans()) == 1)
    [span] = spans.get_finished_spans()
    assert engine.num_aborted == 1
    assert span.status.status_code is StatusCode.UNSET
    assert "gen_ai.response.finish_reasons" not in span.attributes


async def test_without_the_setting_nothing_is_traced(spans) -> None:
    async with http_client(FakeEngine()) as client:
        await client.post("/generate", json={"prompt": "p"}, headers=HEADERS)
    assert spans.get_finished_spans() == ()


class Collector(http.server.BaseHTTPRequestHandler):
    received: list[ExportTraceServiceRequest]

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["content-length"]))
        assert self.path == "/v1/traces"
        self.received.append(ExportTraceServiceRequest.FromString(content))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def test_spans_reach_an_otlp_collector_before_the_server_ends() -> None:
    received: list[ExportTraceServiceRequest] = []
    handler = type("Handler", (Collector,), {"received": received})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{collector.server_port}/v1/traces"
        with running_server(FakeEngine(Settings(traces_endpoint=endpoint))) as address:
            httpx.post(address + "/generate", json={"prompt": "p"}, headers=HEADERS)
        collector.shutdown()
    [resource_spans] = received[0].resource_spans
    named = {a.key: a.value.string_value for a in resource_spans.resource.attributes}
    assert named["service.name"] == "sparseserve"
    [span] = resource_spans.scope_spans[0].spans
    assert span.trace_id.hex() == TRACE_ID


WITHOUT_THE_EXTRA = """
import sys
sys.modules["opentelemetry.sdk.resources"] = None
from typer.testing import CliRunner
from service.cli import app
done = CliRunner().invoke(app, ["serve", "--traces-endpoint", "http://127.0.0.1:9/v1/traces"])
assert done.exit_code == 2, done
assert "sparseserve[otel]" in " ".join(done.output.replace("│", " ").split()), done.output
"""


def test_spans_without_the_packages_are_refused_when_the_server_starts() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_EXTRA], cwd=ROOT, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()


def test_a_server_that_does_not_trace_imports_nothing_of_it() -> None:
    code = (
        "import sys, service.main; from tests.service.fake_engine import FakeEngine, fake_app;"
        " fake_app(FakeEngine()); print([m for m in sys.modules if 'opentelemetry.sdk' in m])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
