"""Every metric, declared once; counters come from the engine's events, gauges from its status."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from typing_extensions import override

from service.engine.events import ABORT_REASONS, FaultKind
from service.engine.sequence import Finish, FinishReason, Sequence
from service.engine.status import EngineStatus
from service.vllm_aliases import VllmAliases
from sparse_methods import Phase, get_sparse_method, list_sparse_methods

_PREFIX = "sparseserve_"
_METHOD = ("method", "version")
_PHASE = (*_METHOD, "phase")
_GAUGES: dict[str, tuple[str, ...]] = {
    "running_requests": (),
    "waiting_requests": (),
    "kv_cache_pages_total": (),
    "kv_cache_pages_used": (),
    "build_info": ("version", "model", "device", "attention"),
    "method_info": (*_METHOD, "hash"),
}
_DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)
_SHORT_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_LONG_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 640)
_TOKENS = tuple(float(2**power) for power in range(18))


class Metrics:
    """Counts the engine's events; the labels ``method`` and ``version`` are the registry's.

    Everything but the gauges of ``watch`` only ever grows, and adds up over replicas.

    Attributes:
        labels: Names of the labels of every sample, by the name under which it is scraped.
    """

    def __init__(self) -> None:
        # No second series per counter, which nobody asks for; the library left it untyped.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        self.labels = {_PREFIX + name: labels for name, labels in _GAUGES.items()}
        self._declare_request_metrics()
        self._declare_attention_metrics()
        self._declare_engine_metrics()
        self._http_requests = self._counter("http_requests", "HTTP requests.", ("route", "code"))
        self._start_at_zero()
        self._aliases: VllmAliases | None = None

    def _declare_request_metrics(self) -> None:
        counter, histogram = self._counter, self._histogram
        self._requests = counter("requests", "Generations ended.", (*_METHOD, "outcome"))
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens.", _METHOD)
        self._generated_tokens = counter("generated_tokens", "Tokens generated.", _METHOD)
        self._cached_tokens = counter("cached_prompt_tokens", "Prompt tokens not recomputed.")
        self._first_token = histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", _LONG_S, _METHOD
        )
        self._inter_token = histogram(
            "inter_token_latency_seconds", "Between two tokens of a generation.", _SHORT_S
        )
        self._duration = histogram("request_duration_seconds", "Arrival to end.", _LONG_S)
        self._queue = histogram("request_queue_seconds", "Arrival to the first step.", _LONG_S)
        self._prompt_length = histogram("prompt_length_tokens", "Length of prompts.", _TOKENS)

    def _declare_attention_metrics(self) -> None:
        counter = self._counter
        self._blocks = counter("blocks", "Visible block pairs, per query head.", _PHASE)
        self._selected = counter("blocks_selected", "Block pairs given to the kernel.", _PHASE)
        self._skipped = counter("blocks_skipped", "Block pairs dropped by the kernel.", _PHASE)
        self._kv_read = counter("kv_bytes_read", "Bytes of keys and values decoding read.")
        self._kv_dense = counter("kv_bytes_dense", "Bytes dense decoding would have read.")
        self._fallbacks = counter("method_fallbacks", "Methods replaced.", (*_METHOD, "reason"))
        self._density = self._histogram(
            "request_density", "Share of block pairs computed in full.", _DENSITIES, _PHASE
        )

    def _declare_engine_metrics(self) -> None:
        counter, histogram = self._counter, self._histogram
        self._preemptions = counter("preemptions", "Generations that gave way.")
        self._aborted = counter("aborted_requests", "Generations aborted.", ("reason",))
        self._engine_errors = counter(
            "engine_errors", "Steps or generations that failed.", ("kind",)
        )
        for kind in FaultKind:  # a rate needs a series before the first error
            self._engine_errors.labels(kind.value)
        self._step_seconds = histogram(
            "engine_step_seconds", "Length of an engine step.", _SHORT_S, ("phase",)
        )
        self._step_tokens = histogram("engine_step_tokens", "Tokens of an engine step.", _TOKENS)

    def _start_at_zero(self) -> None:
        """Show the counters that alerts divide by or wait for: a rate does not see a first one."""
        for reason in ABORT_REASONS:
            self._aborted.labels(reason)
        for name, version, _ in _methods():
            for outcome in FinishReason:
                self._requests.labels(name, version, outcome.value)
            for phase in Phase:
                for counter in (self._blocks, self._selected, self._skipped):
                    counter.labels(name, version, phase.value)

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        self.labels[f"{_PREFIX}{name}_total"] = labels
        return Counter(_PREFIX + name, text, labels, registry=self._registry)

    def _histogram(
        self, name: str, text: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ()
    ) -> Histogram:
        self.labels[f"{_PREFIX}{name}_bucket"] = (*labels, "le")
        self.labels |= dict.fromkeys((f"{_PREFIX}{name}_sum", f"{_PREFIX}{name}_count"), labels)
        return Histogram(_PREFIX + name, text, labels, buckets=buckets, registry=self._registry)

    def watch(
        self, status: Callable[[], EngineStatus], build_labels: Callable[[], dict[str, str] | None]
    ) -> None:
        """Read the gauges from here at every scrape.

        Args:
            status: State of the engine.
            build_labels: Labels of ``build_info``; None until the model is loaded.
        """
        self._registry.register(_Gauges(status, build_labels))

    def alias_for_vllm(
        self, status: Callable[[], EngineStatus], model: Callable[[], str | None], block_size: int
    ) -> None:
        """Export vLLM's names, too, for scalers, routers and dashboards made for it."""
        counted: dict[str, Counter | Histogram] = {
            "prompt_tokens": self._prompt_tokens,
            "generation_tokens": self._generated_tokens,
            "time_to_first_token_seconds": self._first_token,
            "inter_token_latency_seconds": self._inter_token,
            "e2e_request_latency_seconds": self._duration,
            "request_queue_time_seconds": self._queue,
            "request_success": self._requests,  # every end, errors too: their name, their habit
        }
        self._aliases = VllmAliases(counted, status, model, block_size)
        self._registry.register(self._aliases)

    def render(self) -> tuple[bytes, str]:
        """The metrics in text format, and the content type of it."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def http_request(self, route: str, code: int) -> None:
        """An HTTP request was answered; ``route`` is a template, never a path."""
        self._http_requests.labels(route, str(code)).inc()

    def step(self, phase: str, seconds: float, num_tokens: int) -> None:
        """A step ran; phase is prefill, decode or mixed."""
        self._step_seconds.labels(phase).observe(seconds)
        self._step_tokens.observe(num_tokens)

    def preempted(self) -> None:
        """A running generation gave way and will be recomputed."""
        self._preemptions.inc()

    def engine_error(self, kind: FaultKind) -> None:
        """A step or a generation failed."""
        self._engine_errors.labels(kind.value).inc()

    def finished(self, sequence: Sequence, finish: Finish) -> None:
        """A generation ended, aborted ones included."""
        labels = _labels(sequence)
        self._requests.labels(*labels, finish.reason.value).inc()
        self._prompt_tokens.labels(*labels).inc(finish.num_prompt_tokens)
        self._generated_tokens.labels(*labels).inc(finish.num_generated_tokens)
        self._cached_tokens.inc(finish.num_cached_tokens)
        self._duration.observe(finish.timing.total_s)
        self._queue.observe(finish.timing.queue_s)
        self._prompt_length.observe(finish.num_prompt_tokens)
        for phase in Phase:
            counts = finish.statistics.phase(phase)
            if counts.blocks_total == 0:
                continue
            self._blocks.labels(*labels, phase.value).inc(counts.blocks_total)
            self._selected.labels(*labels, phase.value).inc(counts.blocks_selected)
            self._skipped.labels(*labels, phase.value).inc(counts.blocks_skipped)
            self._density.labels(*labels, phase.value).observe(counts.density)
        self._kv_read.inc(finish.statistics.overall.kv_bytes_read)
        self._kv_dense.inc(finish.statistics.overall.kv_bytes_dense)
        if self._aliases is not None:
            self._aliases.finished(finish)

    def aborted(self, reason: str) -> None:
        """A generation was aborted, for one of ``ABORT_REASONS``."""
        self._aborted.labels(reason).inc()

    def first_token(self, sequence: Sequence, seconds: float) -> None:
        """A generation's first token came this long after its arrival."""
        self._first_token.labels(*_labels(sequence)).observe(seconds)

    def inter_token(self, seconds: float) -> None:
        """Time between two tokens of one generation."""
        self._inter_token.observe(seconds)

    def fell_back(self, sequence: Sequence, reason: str) -> None:
        """A generation that ended ran dense, or otherwise than asked, for this cause."""
        self._fallbacks.labels(*_labels(sequence), reason).inc()


class _Gauges(Collector):
    def __init__(
        self, status: Callable[[], EngineStatus], build_labels: Callable[[], dict[str, str] | None]
    ) -> None:
        self._status = status
        self._build_labels = build_labels
        self._methods = _methods()

    @override
    def collect(self) -> Iterator[Metric]:
        status = self._status()
        for name, text, value in (
            ("running_requests", "Generations that own pages.", status.num_running),
            ("waiting_requests", "Generations that wait.", status.num_waiting),
            ("kv_cache_pages_total", "Pages of the KV cache.", status.num_pages_total),
            ("kv_cache_pages_used", "Pages owned by generations.", status.num_pages_used),
        ):
            yield GaugeMetricFamily(_PREFIX + name, text, value)
        labels = self._build_labels()
        if labels is not None:
            names = _GAUGES["build_info"]
            build = GaugeMetricFamily(_PREFIX + "build_info", "What runs.", labels=names)
            build.add_metric([labels[name] for name in names], 1)
            yield build
        methods = GaugeMetricFamily(
            _PREFIX + "method_info",
            "Methods that can be asked for.",
            labels=_GAUGES["method_info"],
        )
        for row in self._methods:
            methods.add_metric(row, 1)
        yield methods


def _methods() -> list[tuple[str, str, str]]:
    """Name, version and hash of every registered method."""
    return [
        (name, version, get_sparse_method(name, version).content_hash())
        for name, versions in list_sparse_methods().items()
        for version in versions
    ]


def _labels(sequence: Sequence) -> tuple[str, str]:
    return sequence.method.registered_name, sequence.method.registered_version
