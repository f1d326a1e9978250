"""POST /v1/completions against an engine that says words."""

from typing import Any

import httpx
import orjson
import pytest

from service.api.openai.completions import CompletionResponse
from service.errors import GenerationError, QueueFullError, QueueTimeoutError
from service.settings import Settings
from tests.service.api.test_generate import events_of
from tests.service.fake_engine import WORDS, FakeEngine, http_client

pytestmark = pytest.mark.anyio
TEXT = "".join(WORDS)


async def post(body: dict[str, Any], query: str = "", engine: Any = None) -> httpx.Response:
    async with http_client(engine or FakeEngine()) as client:
        return await client.post("/v1/completions" + query, json={"prompt": "p", **body})


async def stream(body: dict[str, Any], engine: Any = None) -> list[dict[str, Any]]:
    response = await post({**body, "stream": True}, engine=engine)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    return events_of(response.text)


async def test_an_answer_has_the_shape_of_openai_and_the_sparsity_block() -> None:
    answer = (await post({})).json()
    CompletionResponse.model_validate(answer, extra="forbid")
    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [
        {
            "index": 0,
            "text": TEXT,
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    assert answer["usage"]["total_tokens"] == 9
    assert answer["sparsity"]["method"] == "streaming"


@pytest.mark.parametrize(
    ("prompt", "num_prompts"),
    [("text", 1), ([5, 6], 1), (["one", "two"], 2), ([[5], [6, 7], [8]], 3)],
)
async def test_each_prompt_is_a_generation_of_its_own(prompt: Any, num_prompts: int) -> None:
    engine = FakeEngine()
    answer = (await post({"prompt": prompt, "n": 2}, engine=engine)).json()
    assert len(engine.requests) == num_prompts
    assert [choice["index"] for choice in answer["choices"]] == list(range(2 * num_prompts))
    assert {choice["text"] for choice in answer["choices"]} == {TEXT}
    assert answer["usage"]["prompt_tokens"] == 5 * num_prompts
    assert answer["usage"]["completion_tokens"] == 8 * num_prompts
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 2 * num_prompts}
    assert answer["sparsity"]["overall"]["blocks_total"] == 56 * 2 * num_prompts
    given = [request.prompt or request.prompt_ids for request in engine.requests]
    assert given == ([prompt] if num_prompts == 1 else prompt)


async def test_a_stream_says_the_same_and_closes_with_the_sparsity_block() -> None:
    body = {"prompt": ["one", "two"], "n": 2}
    plain = (await post(body)).json()
    chunks = await stream(body)
    texts = dict.fromkeys(range(4), "")
    for chunk in chunks:
        assert chunk["object"] == "text_completion"
        assert "usage" not in chunk
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
    assert list(texts.values()) == [choice["text"] for choice in plain["choices"]]
    assert [chunk for chunk in chunks if "sparsity" in chunk] == chunks[-1:]
    assert chunks[-1]["sparsity"] == plain["sparsity"]
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1


async def test_usage_comes_in_a_last_chunk_or_in_all_of_them() -> None:
    only_last = await stream({"stream_options": {"include_usage": True}})
    assert [chunk for chunk in only_last if "usage" in chunk] == only_last[-1:]
    assert only_last[-1]["choices"] == []
    assert only_last[-1]["usage"] == (await post({})).json()["usage"]
    assert only_last[-1]["sparsity"] == only_last[-2]["sparsity"]
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = await stream({"stream_options": options})
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 4, 4]
    not_asked = await stream({"stream_options": {"continuous_usage_stats": True}})
    assert not any("usage" in chunk for chunk in not_asked)


async def test_an_echo_stands_before_the_text_plain_and_streamed() -> None:
    body = {"prompt": ["Say: ", "Now: "], "echo": True}
    answer = (await post(body)).json()
    assert [choice["text"] for choice in answer["choices"]] == ["Say: " + TEXT, "Now: " + TEXT]
    chunks = await stream(body)
    text = "".join(c["choices"][0]["text"] for c in chunks if c["choices"][0]["index"] == 1)
    assert text == "Now: " + TEXT
    tokens = FakeEngine.tokenizer.encode("Say: ")
    answer = (await post({"prompt": tokens, "echo": True})).json()
    assert answer["choices"][0]["text"] == "Say: " + TEXT


async def test_logprobs_are_parallel_lists() -> None:
    logprobs = (await post({"logprobs": 1})).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["<|bos|>", "<|eos|>", "<|pad|>", "!"]
    assert logprobs["token_logprobs"] == [-0.5] * 4
    assert logprobs["top_logprobs"][3] == {"!": -0.5}
    assert logprobs["text_offset"] == [0, 0, 0, 0]
    chunks = await stream({"logprobs": 1})
    streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [token for piece in streamed for token in piece["tokens"]] == logprobs["tokens"]


async def test_logprobs_of_an_echo_begin_with_the_prompt() -> None:
    engine = FakeEngine()
    prompt = engine.tokenizer.encode("Say it")
    body = {"prompt": prompt, "echo": True, "logprobs": 1}
    choice = (await post(body, engine=engine)).json()["choices"][0]
    logprobs = choice["logprobs"]
    assert choice["text"] == "Say it" + TEXT
    assert logprobs["tokens"][: len(prompt)] == [engine.tokenizer.token_text(t) for t in prompt]
    assert logprobs["token_logprobs"] == [None] + [-1.5] * (len(prompt) - 1) + [-0.5] * 4
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["text_offset"][:3] == [0, 0, 1]
    assert logprobs["text_offset"][len(prompt)] == len("Say it")
    chunks = await stream(body, engine)
    streamed = [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in chunks]
    assert [offset for piece in streamed for offset in piece] == logprobs["text_offset"]
    assert (await post({"prompt": prompt, "echo": True})).json()["choices"][0]["logprobs"] is None


async def test_fields_reach_the_engine_and_null_is_the_default() -> None:
    engine = FakeEngine()
    nulls: dict[str, Any] = dict.fromkeys(
        ("max_tokens", "temperature", "n", "stream", "stop", "logprobs", "logit_bias", "suffix")
    )
    assert (await post(nulls, engine=engine)).status_code == 200
    assert engine.requests[0].sampling.max_tokens == 16
    body = {"logit_bias": {"5": -100, "7": 1.5}, "add_special_tokens": False, "ignore_eos": True}
    await post({**body, "min_tokens": 3, "stop": ["x"], "seed": 4}, engine=engine)
    sampling = engine.requests[1].sampling
    assert sampling.logit_bias == ((5, -100.0), (7, 1.5))
    assert (sampling.min_tokens, sampling.stop, sampling.seed) == (3, ("x",), 4)
    assert sampling.ignore_eos
    assert not engine.requests[1].adds_special_tokens


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 5]}, "prompt"),
        ({"prompt": [5, True]}, "prompt"),
        ({"prompt": ["a"] * 257}, "prompt"),
        ({"prompt": ["a"] * 256, "n": 2}, "prompt"),
        ({"suffix": "s"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"use_beam_search": 0}, "use_beam_search"),
        ({"logprobs": 21}, "logprobs"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 1, "05": 2}}, "logit_bias"),
        ({"logit_bias": {"5": 100.5}}, "logit_bias"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"surprise": True}}, "stream_options"),
        ({"messages": []}, "messages"),
        ({"guided_json": {}}, "guided_json"),
        ({"vllm_xargs": {"surprise": 1}}, "vllm_xargs"),
        ({"vllm_xargs": {"method_params": "{"}}, "vllm_xargs"),
    ],
)
async def test_what_cannot_be_served_is_refused_and_named(body: dict[str, Any], param: str) -> None:
    response = await post(body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["code"], error["param"]) == (400, param)
    assert len(response.content) <= 2048


async def test_another_model_does_not_exist() -> None:
    response = await post({"model": "other"})
    assert response.status_code == 404
    assert response.json()["error"]["param"] == "model"
    assert (await post({"model": "fake"})).status_code == 200


@pytest.mark.parametrize(
    ("query", "body", "origin"),
    [
        ("?method=dense", {}, "query"),
        ("", {"method": "dense"}, "body"),
        ("", {"vllm_xargs": {"method": "dense", "version": "v1"}}, "body"),
        ("?method=dense", {"method": "dense", "vllm_xargs": {"method": "dense"}}, "query"),
    ],
)
async def test_the_method_comes_from_query_body_or_xargs(
    query: str, body: dict[str, Any], origin: str
) -> None:
    response = await post(body, query)
    block = response.json()["sparsity"]
    assert (block["method"], block["resolved_from"]) == ("dense", origin)
    assert response.headers["x-sparse-method"] == "dense"


@pytest.mark.parametrize(
    ("query", "body"),
    [
        ("?method=dense", {"method": "streaming"}),
        ("?method=dense", {"vllm_xargs": {"method": "streaming"}}),
        ("", {"method": "dense", "vllm_xargs": {"method": "streaming"}}),
    ],
)
async def test_a_contradiction_is_refused_and_names_both(query: str, body: dict[str, Any]) -> None:
    error = (await post(body, query)).json()["error"]
    assert (error["code"], error["param"]) == (400, "method")
    assert "'dense'" in error["message"]
    assert "'streaming'" in error["message"]


@pytest.mark.parametrize("params", [{"window_blocks": 2}, '{"window_blocks": 2}'])
async def test_knobs_in_xargs_are_an_object_or_a_string(params: Any) -> None:
    block = (await post({"vllm_xargs": {"method_params": params}})).json()["sparsity"]
    assert block["params"]["window_blocks"] == 2


@pytest.mark.parametrize("prompt", ["one", ["one", "two"]])
async def test_a_refusal_comes_before_the_stream_and_frees_what_was_taken(prompt: Any) -> None:
    engine = FakeEngine()
    engine.refusal = QueueFullError("Full.")
    response = await post({"prompt": prompt, "stream": True}, engine=engine)
    assert (response.status_code, response.headers["retry-after"]) == (429, "1")
    assert engine.num_running == 0


@pytest.mark.parametrize("prompt", ["one", ["one", "two"]])
async def test_a_failure_in_a_stream_is_an_event(prompt: Any) -> None:
    engine = FakeEngine()
    engine.fail_at, engine.failure = 2, GenerationError("The engine failed.")
    chunks = await stream({"prompt": prompt}, engine)
    assert chunks[-1]["error"]["message"] == "The engine failed."
    assert engine.num_running == 0


async def test_a_chunk_that_says_nothing_is_not_sent() -> None:
    engine = FakeEngine()
    engine.words = ("Once", "", "", " upon")
    chunks = await stream({}, engine)
    assert [orjson.dumps(chunk["choices"][0]["text"]) for chunk in chunks] == [
        b'"Once"',
        b'" upon"',
    ]


async def test_more_choices_than_the_server_holds_are_refused_for_good() -> None:
    small = FakeEngine(Settings(max_waiting_requests=2, max_running_requests=2))
    response = await post({"prompt": ["a"] * 5}, engine=small)
    assert response.status_code == 400
    assert "holds 4" in response.json()["error"]["message"]


async def test_what_the_engine_says_is_read_only_when_the_stream_has_begun() -> None:
    chunks = await stream({"prompt": ["one", "two"], "timeout_s": 60})
    assert {chunk["choices"][0]["index"] for chunk in chunks} == {0, 1}


@pytest.mark.parametrize("prompt", ["one", ["one", "two"]])
async def test_a_stream_whose_turn_does_not_come_is_refused_before_it_begins(prompt: Any) -> None:
    engine = FakeEngine()
    engine.late = QueueTimeoutError("Late.")
    response = await post({"prompt": prompt, "stream": True}, "?method=dense", engine)
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-sparse-method"] == "dense"
    assert response.headers["x-sparse-version"] == "v1"
    assert engine.num_running == 0
