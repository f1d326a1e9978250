"""The answers of POST /generate, plain and streamed."""

import asyncio
import socket
from typing import Any

import httpx
import orjson
import pytest

from service.api.generate import GenerateResponse
from service.errors import GenerationError, QueueFullError, QueueTimeoutError
from tests.service.fake_engine import (
    WORDS,
    FakeEngine,
    http_client,
    running_server,
    wait_until,
)

pytestmark = pytest.mark.anyio
TEXT = "".join(WORDS)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


async def post(engine: FakeEngine, body: dict[str, Any], query: str = "") -> httpx.Response:
    async with http_client(engine) as client:
        return await client.post("/generate" + query, json={"prompt": "p", **body})


def events_of(text: str) -> list[dict[str, Any]]:
    lines = [line for line in text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [orjson.loads(line.removeprefix("data: ")) for line in lines[:-1]]


async def test_an_answer_has_the_documented_shape(engine: FakeEngine) -> None:
    response = await post(engine, {})
    answer = response.json()
    assert response.status_code == 200
    GenerateResponse.model_validate(answer, extra="forbid")
    assert answer["id"].startswith("gen-")
    assert answer["text"] == answer["choices"][0]["text"] == TEXT
    assert answer["choices"][0]["token_ids"] == [0, 1, 2, 3]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["logprobs"] is None
    assert answer["choices"][0]["stop_reason"] is None
    assert answer["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 4,
        "total_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    assert answer["timing"]["total_s"] == 0.7


async def test_the_sparsity_block_is_summed_over_layers(engine: FakeEngine) -> None:
    block = (await post(engine, {})).json()["sparsity"]
    assert block["prefill"] == {
        "blocks_total": 40,
        "blocks_selected": 32,
        "blocks_skipped": 12,
        "density": 0.5,
        "sparsity": 0.5,
    }
    assert block["decode"]["kv_bytes_read"] == 200
    assert block["decode"]["kv_bytes_dense"] == 800
    assert block["overall"]["blocks_total"] == 56
    assert block["fallback"] is None
    assert block["threshold"] == {"type": "none", "value": None}
    assert "layers" not in block


async def test_detail_decides_what_the_sparsity_block_holds(engine: FakeEngine) -> None:
    assert (await post(engine, {"sparsity_detail": "none"})).json()["sparsity"] is None
    layers = (await post(engine, {"sparsity_detail": "layer"})).json()["sparsity"]["layers"]
    assert [layer["layer"] for layer in layers] == [0, 1]
    assert layers[0]["prefill"]["blocks_total"] == 20
    assert "heads" not in layers[0]
    heads = (await post(engine, {"sparsity_detail": "head"})).json()["sparsity"]["layers"][0][
        "heads"
    ]
    assert [head["head"] for head in heads] == [0, 1]
    assert heads[0]["decode"]["blocks_total"] == 4


async def test_several_choices_are_summed_and_the_prompt_counts_once(engine: FakeEngine) -> None:
    answer = (await post(engine, {"n": 2})).json()
    assert [choice["text"] for choice in answer["choices"]] == [TEXT, TEXT]
    assert answer["usage"]["prompt_tokens"] == 5
    assert answer["usage"]["completion_tokens"] == 8
    assert answer["sparsity"]["prefill"]["blocks_total"] == 80


async def test_logprobs_are_per_token(engine: FakeEngine) -> None:
    logprobs = (await post(engine, {"logprobs": 1})).json()["choices"][0]["logprobs"]
    assert logprobs[1] == {
        "token_id": 1,
        "logprob": -0.5,
        "top": [{"token_id": 1, "logprob": -0.5}],
    }


async def test_streamed_text_equals_the_plain_text(engine: FakeEngine) -> None:
    response = await post(engine, {"stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-accel-buffering"] == "no"
    events = events_of(response.text)
    assert "".join(event["text"] for event in events) == TEXT
    assert [token for event in events for token in event["token_ids"]] == [0, 1, 2, 3]
    assert all("usage" not in event for event in events[:-1])
    plain = (await post(engine, {})).json()
    for key in ("model", "method", "version", "usage", "sparsity", "timing"):
        assert events[-1][key] == plain[key]
    assert events[-1]["finish_reason"] == "stop"


async def test_a_stream_of_choices_closes_once(engine: FakeEngine) -> None:
    events = events_of((await post(engine, {"stream": True, "n": 3, "logprobs": 0})).text)
    assert [event["index"] for event in events if "finish_reason" in event] == [0, 1, 2]
    assert [event for event in events if "usage" in event] == [events[-1]]
    assert events[-1]["usage"]["completion_tokens"] == 12
    assert events[0]["logprobs"][0]["token_id"] == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_headers_name_the_method_and_the_request(engine: FakeEngine, stream: bool) -> None:
    response = await post(engine, {"stream": stream}, "?method=dense")
    assert response.headers["x-sparse-method"] == "dense"
    assert response.headers["x-sparse-version"] == "v1"
    assert len(response.headers["x-request-id"]) == 32


async def test_a_failure_after_the_first_byte_is_an_event(engine: FakeEngine) -> None:
    engine.fail_at, engine.failure = 2, GenerationError("The engine failed.")
    response = await post(engine, {"stream": True})
    events = events_of(response.text)
    assert response.status_code == 200
    assert [event.get("text") for event in events] == ["Once", " upon", None]
    assert events[-1]["error"]["code"] == 500
    assert events[-1]["error"]["message"] == "The engine failed."
    assert engine.num_running == 0


async def test_an_unforeseen_failure_in_a_stream_tells_no_details(engine: FakeEngine) -> None:
    engine.fail_at, engine.failure = 1, KeyError("/secret/path")
    text = (await post(engine, {"stream": True})).text
    assert "secret" not in text
    assert events_of(text)[-1]["error"]["type"] == "InternalServerError"


async def test_a_failure_without_a_stream_is_a_500_not_to_be_retried(engine: FakeEngine) -> None:
    engine.fail_at, engine.failure = 2, GenerationError("The engine failed.")
    response = await post(engine, {})
    assert response.status_code == 500
    assert response.headers["x-should-retry"] == "false"
    assert engine.num_running == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_a_refusal_comes_before_the_stream_begins(engine: FakeEngine, stream: bool) -> None:
    engine.refusal = QueueFullError("Full.")
    response = await post(engine, {"stream": stream})
    assert response.status_code == 429
    assert response.headers["retry-after"] == "1"
    assert response.json()["error"]["type"] == "TooManyRequestsError"
    assert response.headers["x-sparse-method"] == "streaming"


async def test_a_prompt_of_token_ids_reaches_the_engine(engine: FakeEngine) -> None:
    async with http_client(engine) as client:
        await client.post("/generate", json={"prompt_token_ids": [5, 6], "stop": "x", "top_k": -1})
    request = engine.requests[0]
    assert (request.prompt, request.prompt_ids) == (None, [5, 6])
    assert request.sampling.stop == ("x",)
    assert request.sampling.top_k == 0


async def test_null_means_the_default_where_a_field_may_be_left_out(engine: FakeEngine) -> None:
    nulls = dict.fromkeys(
        ("method", "version", "method_params", "seed", "stop", "stop_token_ids", "logprobs")
    )
    assert (await post(engine, nulls)).status_code == 200


@pytest.mark.parametrize("stream", [b"false", b"true"])
def test_a_client_that_leaves_frees_its_place(engine: FakeEngine, stream: bytes) -> None:
    engine.step_s = 3600.0  # as in the queue, or in a long prefill: nothing has been sent yet
    body = b'{"prompt": "p", "stream": ' + stream + b"}"
    with running_server(engine) as address:
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as client:
            client.sendall(
                b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            wait_until(lambda: engine.num_running == 1)
        wait_until(lambda: engine.num_running == 0)
        assert engine.num_aborted == 1
        metrics = httpx.get(address + "/metrics").text
    assert 'sparseserve_aborted_requests_total{reason="client"} 1.0' in metrics


def test_a_client_that_leaves_in_mid_stream_frees_its_place(engine: FakeEngine) -> None:
    engine.step_s, engine.words = 0.02, ("word",) * 1000
    with running_server(engine) as address:
        with httpx.stream(
            "POST", address + "/generate", json={"prompt": "p", "stream": True}
        ) as response:
            next(response.iter_lines())
        wait_until(lambda: engine.num_aborted == 1)


async def test_concurrent_requests_do_not_mix(engine: FakeEngine) -> None:
    engine.step_s = 0.001
    async with http_client(engine) as client:
        answers = await asyncio.gather(
            *(
                client.post(
                    "/generate",
                    params={"method": ("dense", "streaming")[i % 2]},
                    json={"prompt": str(i)},
                )
                for i in range(20)
            )
        )
    for i, answer in enumerate(answers):
        assert answer.json()["method"] == answer.headers["x-sparse-method"]
        assert answer.json()["method"] == ("dense", "streaming")[i % 2]


async def test_thresholds_by_length_are_answered_plain_and_streamed(engine: FakeEngine) -> None:
    """The contract keys them by int, which JSON cannot."""
    fit = {"a": 10.0, "b": 1.0}
    params = {"calibration_params": {"prefill": fit}, "target_sparse_ratio": {"prefill": 0.5}}
    body = {"method": "flash_skip_softmax", "version": "v1", "method_params": params}
    plain = await post(engine, body)
    assert plain.status_code == 200, plain.text
    *_, closing = events_of((await post(engine, {**body, "stream": True})).text)
    for answer in (plain.json(), closing):
        phase = answer["sparsity"]["threshold"]["phases"]["prefill"]
        scale = phase["scale_factor"]
        assert phase["example_thresholds"]["4096"] == pytest.approx(scale / 4096)


async def test_fields_about_scheduling_reach_the_engine(engine: FakeEngine) -> None:
    fields = {"priority": -2, "timeout_s": 3, "cache_salt": "mine"}
    async with http_client(engine) as client:
        await client.post("/generate", json={"prompt": "a", **fields})
        await client.post("/generate", json={"prompt": "a"})
    given, plain = engine.requests
    assert (given.priority, given.timeout_s, given.cache_salt) == (-2, 3.0, "mine")
    assert (plain.priority, plain.timeout_s, plain.cache_salt) == (0, None, None)


@pytest.mark.parametrize(
    "field",
    [
        {"priority": 2**31},
        {"priority": 1.5},
        {"timeout_s": 0},
        {"timeout_s": "1"},
        {"timeout_s": 1e9},
        {"cache_salt": ""},
        {"cache_salt": "x" * 257},
    ],
)
async def test_fields_about_scheduling_have_bounds(
    engine: FakeEngine, field: dict[str, object]
) -> None:
    response = await post(engine, field)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == next(iter(field))


async def test_a_stream_whose_turn_does_not_come_is_refused_before_it_begins(
    engine: FakeEngine,
) -> None:
    engine.late = QueueTimeoutError("Late.")
    response = await post(engine, {"stream": True})
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")
    assert engine.num_running == 0


async def test_a_refusal_says_when_to_come_back(engine: FakeEngine) -> None:
    engine.refusal = QueueFullError("Full.", 17)
    response = await post(engine, {})
    assert (response.status_code, response.headers["retry-after"]) == (429, "17")
    engine.refusal = QueueTimeoutError("Late.")
    response = await post(engine, {})
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")
