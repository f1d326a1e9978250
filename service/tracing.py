"""OpenTelemetry spans: one per request that generates, with what its attention left out.

Names are those of the semantic conventions for generative AI, latencies vLLM's, the rest begins
with ``sparseserve.``. No text of a client is in them. The packages of the extra ``otel`` are
imported only by a server that was told where to send spans.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from service.errors import ServiceError
from sparse_methods import Phase
from sparse_methods.errors import SparseMethodError
from sparse_methods.statistics import RequestStatistics

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

    from service.engine.generation import GenerationRequest
    from service.engine.sequence import Finish, Update

_SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "frequency_penalty", "presence_penalty")
_COUNTS = ("blocks_total", "blocks_selected", "blocks_skipped", "density")
_CHAT = "/chat/completions"
_FLUSH_S = 3.0

Attribute = str | int | float | bool | list[str]


class Followed(Protocol):
    """What a route needs of a generation."""

    prompt_ids: list[int]

    async def has_begun(self) -> None:
        """See ``Generation.has_begun``."""
        ...

    def __aiter__(self) -> AsyncIterator[tuple[int, Update]]:
        """Yield (choice index, update) until every choice has ended."""
        ...


class Tracing:
    """Starts the spans of this process.

    Attributes:
        provider: Makes the spans and exports them.
    """

    def __init__(self, provider: TracerProvider) -> None:
        self.provider = provider
        self._tracer = provider.get_tracer("sparseserve")

    @classmethod
    def to_otlp(cls, endpoint: str, version: str) -> Tracing:
        """Send spans to an OTLP/HTTP endpoint; samplers and headers are OpenTelemetry's variables.

        Raises:
            ServiceError: The packages of the extra ``otel`` are not installed.
        """
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ServiceError(
                f"Spans need packages that are not installed ({error.name}):"
                " pip install 'sparseserve[otel]'.",
                "traces_endpoint",
            ) from None
        resource = Resource.create()  # what OpenTelemetry's variables say
        if str(resource.attributes["service.name"]).startswith("unknown_service"):
            named = Resource({"service.name": "sparseserve", "service.version": version})
            resource = resource.merge(named)
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        # An absent collector may cost spans, never a request or the end of the process.
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        return cls(provider)

    def start(self, caller: Caller, request: GenerationRequest, model: str) -> Span:
        """Begin the span of a request; its parent is what the client's headers name."""
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        operation = "chat" if caller.path.endswith(_CHAT) else "text_completion"
        return self._tracer.start_span(
            f"{operation} {model}",
            context=TraceContextTextMapPropagator().extract(caller.headers),
            kind=SpanKind.SERVER,
            attributes={
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "sparseserve",
                **_asked(request, model),
            },
        )

    def flush(self) -> None:
        """Send what is left, for a few seconds at most: force_flush heeds no limit by itself."""
        thread = threading.Thread(target=self.provider.force_flush, daemon=True)
        thread.start()
        thread.join(_FLUSH_S)


@dataclass(frozen=True)
class Caller:
    """Where a traced request came from.

    Attributes:
        headers: The W3C headers ``traceparent`` and ``tracestate``, if they were sent.
    """

    tracing: Tracing
    path: str
    headers: Mapping[str, str]


# Set by the middleware around each request of a server that traces.
current_caller: ContextVar[Caller | None] = ContextVar("current_caller", default=None)


class Trace:
    """The span of one request; without one it does nothing."""

    def __init__(self, span: Span | None = None) -> None:
        self._span = span
        self._finishes: dict[int, Finish] = {}

    def follow(self, generation: Followed) -> Followed:
        """The generation, watched on its way to the client."""
        return generation if self._span is None else _FollowedGeneration(generation, self)

    def saw(self, index: int, update: Update) -> None:
        """Keep the end of a choice."""
        if update.finish is not None:
            self._finishes[index] = update.finish

    def fail(self, error: Exception) -> None:
        """The request was refused, or the engine failed it."""
        if self._span is not None:
            from opentelemetry.trace import StatusCode

            self._span.set_attribute("error.type", type(error).__name__)
            self._span.set_status(StatusCode.ERROR)

    def end(self) -> None:
        """Write down what is known by now."""
        if self._span is None:
            return
        if self._finishes:
            self._span.set_attributes(_given(list(self._finishes.values())))
        self._span.end()


class _FollowedGeneration:
    def __init__(self, generation: Followed, trace: Trace) -> None:
        self.prompt_ids = generation.prompt_ids
        self._generation = generation
        self._trace = trace

    async def has_begun(self) -> None:
        await self._generation.has_begun()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Update]]:
        try:
            async for index, update in self._generation:
                self._trace.saw(index, update)
                yield index, update
        except ServiceError as error:  # a stream turns it into an event; nobody else would see it
            self._trace.fail(error)
            raise


@contextmanager
def traced(request: GenerationRequest, model: str) -> Iterator[Trace]:
    """Give a request a span from here to the end of its answer, if this server traces."""
    caller = current_caller.get()
    trace = Trace() if caller is None else Trace(caller.tracing.start(caller, request, model))
    try:
        yield trace
    except (ServiceError, SparseMethodError) as error:
        trace.fail(error)
        raise
    finally:
        trace.end()


def _asked(request: GenerationRequest, model: str) -> dict[str, Attribute]:
    sampling = vars(request.sampling)
    attributes: dict[str, Attribute] = {
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
        "gen_ai.response.id": request.request_id,
        "gen_ai.request.choice.count": request.n,
        "sparseserve.method": request.method.registered_name,
        "sparseserve.version": request.method.registered_version,
    }
    attributes |= {f"gen_ai.request.{name}": sampling[name] for name in _SAMPLING}
    if request.sampling.seed is not None:
        attributes["gen_ai.request.seed"] = request.sampling.seed
    return attributes


def _given(finishes: list[Finish]) -> dict[str, Attribute]:
    statistics = sum((finish.statistics for finish in finishes), RequestStatistics())
    timing, overall = finishes[0].timing, statistics.overall
    attributes: dict[str, Attribute] = {
        "gen_ai.response.finish_reasons": [finish.reason.value for finish in finishes],
        "gen_ai.usage.input_tokens": finishes[0].num_prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": finishes[0].num_cached_tokens,
        "gen_ai.usage.output_tokens": sum(finish.num_generated_tokens for finish in finishes),
        "gen_ai.latency.time_in_queue": timing.queue_s,
        "gen_ai.latency.time_to_first_token": timing.time_to_first_token_s,
        "gen_ai.latency.time_in_model_prefill": timing.prefill_s,
        "gen_ai.latency.time_in_model_decode": timing.decode_s,
        "gen_ai.latency.e2e": timing.total_s,
        "sparseserve.kv_bytes_read": overall.kv_bytes_read,
        "sparseserve.kv_bytes_dense": overall.kv_bytes_dense,
    }
    for phase in Phase:
        counts = statistics.phase(phase)
        attributes |= {f"sparseserve.{phase.value}.{n}": getattr(counts, n) for n in _COUNTS}
    return attributes
