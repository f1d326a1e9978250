"""The metrics operators build on: their names and labels change by no accident."""

import re
from collections import Counter

import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.engine.events import FaultKind
from service.engine.sequence import FinishReason
from service.metrics import Metrics
from sparse_methods import get_sparse_method, list_sparse_methods
from tests.service.fake_engine import FakeEngine, fake_sequence, finish, http_client

CONTRACT = {
    "counter": """
        requests{method,version,outcome} prompt_tokens{method,version}
        generated_tokens{method,version} cached_prompt_tokens{} blocks{method,version,phase}
        blocks_selected{method,version,phase} blocks_skipped{method,version,phase}
        kv_bytes_read{} kv_bytes_dense{} method_fallbacks{method,version,reason} preemptions{}
        aborted_requests{reason} engine_errors{kind} http_requests{route,code}
    """,
    "histogram": """
        request_density{method,version,phase} time_to_first_token_seconds{method,version}
        inter_token_latency_seconds{} request_duration_seconds{} request_queue_seconds{}
        prompt_length_tokens{} engine_step_seconds{phase} engine_step_tokens{}
    """,
    "gauge": """
        running_requests{} waiting_requests{} kv_cache_pages_total{} kv_cache_pages_used{}
        build_info{version,model,device,attention} method_info{method,version,hash}
    """,
}
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
BUILD = {"version": "1", "model": "m", "device": "cpu", "attention": "reference"}


def contract() -> dict[str, tuple[str, ...]]:
    """Labels of every sample name."""
    samples = {}
    for kind, text in CONTRACT.items():
        for name, labels in re.findall(r"(\w+){([\w,]*)}", text):
            for suffix in SUFFIXES[kind]:
                names = [*filter(None, labels.split(",")), *(["le"] * (suffix == "_bucket"))]
                samples[f"sparseserve_{name}{suffix}"] = tuple(names)
    return samples


def exercised(method: str = "dense") -> Metrics:
    """Metrics that have seen one of every event."""
    metrics, engine = Metrics(), FakeEngine()
    metrics.watch(engine.status, lambda: BUILD)
    sequence = fake_sequence(get_sparse_method(method)())
    for reason in FinishReason:
        metrics.finished(sequence, finish(reason))
    metrics.step("mixed", 0.5, 7)
    metrics.preempted()
    metrics.engine_error(FaultKind.STEP)
    metrics.aborted("client")
    metrics.first_token(sequence, 0.25)
    metrics.inter_token(0.125)
    metrics.fell_back(sequence, "below_break_even")
    metrics.http_request("/generate", 200)
    return metrics


def scraped(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(metrics.render()[0].decode())
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def test_the_samples_are_those_of_the_contract_with_its_labels() -> None:
    seen = {name: {key for key, _ in labels} for name, labels in scraped(exercised())}
    assert seen == {name: set(labels) for name, labels in contract().items()}


def test_the_metrics_know_their_own_labels() -> None:
    assert exercised().labels == contract()


def test_every_type_is_that_of_the_contract() -> None:
    text = exercised().render()[0].decode()
    types = Counter(re.findall(r"^# TYPE sparseserve_\w+ (\w+)$", text, re.MULTILINE))
    wanted = {kind: len(re.findall(r"{", names)) for kind, names in CONTRACT.items()}
    assert types == wanted


def test_two_replicas_add_up_to_one_that_saw_everything() -> None:
    both, replicas = Metrics(), (Metrics(), Metrics())
    for replica, method, number in zip(replicas, ("dense", "streaming"), (1, 7), strict=True):
        sequence = fake_sequence(get_sparse_method(method)())
        for metrics in (replica, both):
            metrics.finished(sequence, finish(num_generated=number))
            metrics.first_token(sequence, 0.25)
            metrics.step("decode", 0.25, number)
            metrics.http_request("/generate", 200)
    sums: Counter[object] = Counter()
    for replica in replicas:
        sums.update(scraped(replica))
    assert sums == scraped(both)


def test_what_alerts_divide_by_is_there_before_the_first_request() -> None:
    names = Counter(name for name, _ in scraped(Metrics()))
    methods = sum(map(len, list_sparse_methods().values()))
    assert names["sparseserve_requests_total"] == methods * len(FinishReason)
    assert names["sparseserve_blocks_total"] == methods * 2


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_no_text_of_a_client_becomes_a_label() -> None:
    async with http_client(FakeEngine()) as client:

        async def series() -> set[str]:
            lines = (await client.get("/metrics")).text.splitlines()
            return {line.rpartition(" ")[0] for line in lines if line[0] != "#"}

        async def ask(word: str) -> None:
            await client.post(f"/generate?method={word}", json={"prompt": word})
            await client.post(f"/generate?method=dense&version={word}", json={"prompt": word})
            await client.get(f"/methods/{word}")
            await client.get(f"/{word}/{word}")

        await ask("first")
        await series()
        before = await series()
        for number in range(20):
            await ask(f"other{number}")
        assert await series() == before
        assert "first" not in str(before)
