"""vLLM's names for our metrics, so that scalers, routers and dashboards made for it work here.

What we count already is renamed at the scrape, with methods summed; what only vLLM has a name for
is observed here. Every series carries vLLM's two labels, the model and the number of the engine.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import Counter, Histogram
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from typing_extensions import override

from service.engine.sequence import Finish
from service.engine.status import EngineStatus

_PREFIX = "vllm:"
_LABELS = ("model_name", "engine")
_KEPT = {"outcome": "finished_reason"}
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5, 10)
_PHASE_S = (0.01, 0.05, 0.1, 0.3, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 240, 480, 960)

Labels = dict[str, str]


class VllmAliases(Collector):
    """Exports vLLM's names beside ours, once the model is loaded.

    Args:
        counted: Our counters and histograms by their names at vLLM, without its prefix.
        status: State of the engine.
        model: Name of the model; None until it is loaded.
        block_size: Tokens of a page.
    """

    def __init__(
        self,
        counted: Mapping[str, Counter | Histogram],
        status: Callable[[], EngineStatus],
        model: Callable[[], str | None],
        block_size: int,
    ) -> None:
        self._status = status
        self._model = model
        self._block_size = block_size
        self._per_token = _histogram(_TOKEN_S)
        self._prefill, self._decode = _histogram(_PHASE_S), _histogram(_PHASE_S)
        self._sources: dict[str, Counter | Histogram] = {
            **counted,
            "request_time_per_output_token_seconds": self._per_token,
            "request_prefill_time_seconds": self._prefill,
            "request_decode_time_seconds": self._decode,
        }

    def finished(self, finish: Finish) -> None:
        """Observe the end of a generation."""
        self._prefill.observe(finish.timing.prefill_s)
        self._decode.observe(finish.timing.decode_s)
        if finish.num_generated_tokens > 1:
            self._per_token.observe(finish.timing.decode_s / (finish.num_generated_tokens - 1))

    @override
    def collect(self) -> Iterator[Metric]:
        model = self._model()
        if model is None:
            return
        labels = dict(zip(_LABELS, (model, "0"), strict=True))
        yield from self._gauges(labels)
        for name, source in self._sources.items():
            for family in source.collect():
                yield _renamed(family, _PREFIX + name, labels)

    def _gauges(self, labels: Labels) -> Iterator[Metric]:
        status = self._status()
        used = status.num_pages_used / max(1, status.num_pages_total)
        cache = {"block_size": self._block_size, "num_gpu_blocks": status.num_pages_total}
        cache_labels = {name: str(value) for name, value in cache.items()}
        for name, text, value, more in (
            ("num_requests_running", "Generations that own pages.", status.num_running, {}),
            ("num_requests_waiting", "Generations that wait.", status.num_waiting, {}),
            ("kv_cache_usage_perc", "Share of the pages in use, 0 to 1.", used, {}),
            ("cache_config_info", "The KV cache.", 1, cache_labels),
        ):
            all_labels = labels | more
            family = GaugeMetricFamily(_PREFIX + name, text, labels=list(all_labels))
            family.add_metric(list(all_labels.values()), value)
            yield family


def _histogram(buckets: tuple[float, ...]) -> Histogram:
    """A histogram of no registry; its name is given when it is collected."""
    return Histogram("alias", "Seconds of a finished generation.", buckets=buckets, registry=None)


def _renamed(family: Metric, name: str, labels: Labels) -> Metric:
    """The family under vLLM's name and labels; what differs in our other labels is summed."""
    sums: dict[tuple[str, tuple[tuple[str, str], ...]], float] = defaultdict(float)
    for sample in family.samples:
        ending = sample.name.removeprefix(family.name)
        sums[ending, tuple((labels | _kept(sample.labels)).items())] += sample.value
    kind = HistogramMetricFamily if family.type == "histogram" else CounterMetricFamily
    renamed: Metric = kind(name, family.documentation)
    for (ending, items), value in sums.items():
        renamed.add_sample(name + ending, dict(items), value)
    return renamed


def _kept(labels: Mapping[str, str]) -> Labels:
    renamed = {_KEPT.get(name, name): value for name, value in labels.items()}
    return {name: renamed[name] for name in ("finished_reason", "le") if name in renamed}
