"""vLLM's names say the same as ours, with methods summed."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.metrics import Metrics
from service.settings import Settings
from sparse_methods import get_sparse_method
from tests.service.fake_engine import FakeEngine, fake_sequence, finish, http_client

FAMILIES = {
    "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "cache_config_info",
    "prompt_tokens", "generation_tokens", "time_to_first_token_seconds",
    "inter_token_latency_seconds", "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds", "request_queue_time_seconds", "request_prefill_time_seconds",
    "request_decode_time_seconds", "request_success",
}  # fmt: skip
BASE = {"model_name": "m", "engine": "0"}


def aliased(model: str | None = "m") -> Metrics:
    metrics = Metrics()
    metrics.alias_for_vllm(FakeEngine().status, lambda: model, block_size=128)
    for method in ("dense", "streaming"):
        sequence = fake_sequence(get_sparse_method(method)())
        metrics.first_token(sequence, 0.25)
        metrics.inter_token(0.125)
        metrics.finished(sequence, finish(num_generated=5))
    return metrics


def samples(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name.removeprefix("vllm:"), frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(metrics.render()[0].decode())
        for sample in family.samples
        if family.name.startswith("vllm:")
    }


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return samples(metrics)[name, frozenset((BASE | labels).items())]


def test_exactly_the_names_that_consumers_rely_on() -> None:
    text = aliased().render()[0].decode()
    families = [f for f in text_string_to_metric_families(text) if f.name.startswith("vllm:")]
    assert {family.name.removeprefix("vllm:") for family in families} == FAMILIES
    for family in families:
        for sample in family.samples:
            assert BASE.items() <= sample.labels.items()


def test_they_say_what_our_own_say() -> None:
    metrics = aliased()
    assert value(metrics, "num_requests_waiting") == 3
    assert value(metrics, "kv_cache_usage_perc") == 16 / 64
    assert value(metrics, "cache_config_info", block_size="128", num_gpu_blocks="64") == 1
    assert value(metrics, "prompt_tokens_total") == 10
    assert value(metrics, "generation_tokens_total") == 10
    assert value(metrics, "request_success_total", finished_reason="stop") == 2
    assert value(metrics, "request_success_total", finished_reason="error") == 0
    assert value(metrics, "time_to_first_token_seconds_bucket", le="0.25") == 2
    assert value(metrics, "time_to_first_token_seconds_bucket", le="0.1") == 0
    assert value(metrics, "time_to_first_token_seconds_sum") == 0.5
    assert value(metrics, "inter_token_latency_seconds_count") == 2
    assert value(metrics, "e2e_request_latency_seconds_sum") == 1.4
    assert value(metrics, "request_prefill_time_seconds_sum") == 0.4
    assert value(metrics, "request_decode_time_seconds_sum") == 0.8
    assert value(metrics, "request_time_per_output_token_seconds_sum") == pytest.approx(0.2)


def test_no_alias_before_the_model_has_a_name() -> None:
    assert samples(aliased(model=None)) == {}


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("wanted", [False, True])
async def test_the_setting_decides(wanted: bool) -> None:
    engine = FakeEngine(Settings(vllm_metric_aliases=wanted))
    async with http_client(engine) as client:
        text = (await client.get("/metrics")).text
    assert ('vllm:num_requests_running{engine="0",model_name="fake"}' in text) == wanted
