"""Counters equal the sum over requests; gauges are read at the scrape."""

import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from service.engine.events import FaultKind
from service.engine.sequence import FinishReason
from service.metrics import Metrics
from sparse_methods import get_sparse_method
from tests.service.fake_engine import FakeEngine, fake_sequence, finish

LABELS = {"method": "dense", "version": "v1"}


def samples(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    content, content_type = metrics.render()
    assert content_type.startswith("text/plain")
    return {
        (sample.name.removeprefix("sparseserve_"), frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(content.decode())
        for sample in family.samples
    }


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return samples(metrics)[name, frozenset(labels.items())]


def watched(engine: FakeEngine) -> Metrics:
    metrics = Metrics()
    build = {"version": "1", "model": "m", "device": "cpu", "attention": "reference"}
    metrics.watch(engine.status, lambda: build)
    return metrics


def test_finished_generations_add_up() -> None:
    metrics, sequence = Metrics(), fake_sequence(get_sparse_method("dense", "v1")())
    metrics.finished(sequence, finish(num_generated=4))
    metrics.finished(sequence, finish(FinishReason.ABORT, num_generated=1))
    assert value(metrics, "requests_total", **LABELS, outcome="stop") == 1
    assert value(metrics, "requests_total", **LABELS, outcome="abort") == 1
    assert value(metrics, "prompt_tokens_total", **LABELS) == 10
    assert value(metrics, "generated_tokens_total", **LABELS) == 5
    assert value(metrics, "cached_prompt_tokens_total") == 4
    assert value(metrics, "blocks_total", **LABELS, phase="prefill") == 80
    assert value(metrics, "blocks_selected_total", **LABELS, phase="prefill") == 64
    assert value(metrics, "blocks_skipped_total", **LABELS, phase="decode") == 8
    assert value(metrics, "kv_bytes_read_total") == 400
    assert value(metrics, "kv_bytes_dense_total") == 1600
    assert value(metrics, "request_density_sum", **LABELS, phase="prefill") == 1.0
    assert value(metrics, "request_duration_seconds_count") == 2
    assert value(metrics, "request_queue_seconds_count") == 2
    assert value(metrics, "prompt_length_tokens_sum") == 10


def test_every_other_event_has_its_metric() -> None:
    metrics, sequence = Metrics(), fake_sequence(get_sparse_method("dense", "v1")())
    metrics.step("mixed", 0.5, 7)
    metrics.preempted()
    metrics.engine_error(FaultKind.METHOD)
    metrics.aborted("client")
    metrics.first_token(sequence, 0.25)
    metrics.inter_token(0.125)
    metrics.fell_back(sequence, "window")
    metrics.http_request("/generate", 200)
    assert value(metrics, "engine_step_seconds_sum", phase="mixed") == 0.5
    assert value(metrics, "engine_step_tokens_sum") == 7
    assert value(metrics, "preemptions_total") == 1
    assert value(metrics, "engine_errors_total", kind="method") == 1
    assert value(metrics, "engine_errors_total", kind="hang") == 0
    assert value(metrics, "aborted_requests_total", reason="client") == 1
    assert value(metrics, "aborted_requests_total", reason="deadline") == 0  # but it is there
    assert value(metrics, "time_to_first_token_seconds_sum", **LABELS) == 0.25
    assert value(metrics, "inter_token_latency_seconds_sum") == 0.125
    assert value(metrics, "method_fallbacks_total", **LABELS, reason="window") == 1
    assert value(metrics, "http_requests_total", route="/generate", code="200") == 1


def test_gauges_are_read_at_the_scrape() -> None:
    engine = FakeEngine()
    metrics = watched(engine)
    assert value(metrics, "running_requests") == 0
    engine.num_running = 5
    assert value(metrics, "running_requests") == 5
    assert value(metrics, "waiting_requests") == 3
    assert value(metrics, "kv_cache_pages_total") == 64
    assert value(metrics, "kv_cache_pages_used") == 16
    digest = get_sparse_method("dense", "v1").content_hash()
    assert value(metrics, "method_info", **LABELS, hash=digest) == 1


def test_two_applications_do_not_share_counters() -> None:
    one, other = Metrics(), Metrics()
    one.preempted()
    assert value(other, "preemptions_total") == 0


def test_names_are_the_documented_ones() -> None:
    names = {name for name, _ in samples(watched(FakeEngine()))}
    text = watched(FakeEngine()).render()[0].decode()
    declared = set(re.findall(r"# TYPE sparseserve_(\w+)", text))
    for documented in ("requests_total", "engine_errors_total", "build_info", "request_density"):
        assert documented in declared | names
    assert not [name for name in names if name.endswith("_created")]
    source = (Path(__file__).parent.parent.parent / "service" / "metrics.py").read_text()
    assert "REGISTRY" not in source
