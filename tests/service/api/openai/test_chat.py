"""POST /v1/chat/completions against an engine that says words."""

from typing import Any

import httpx
import pytest

from service.api.openai.chat import ChatResponse
from service.errors import QueueTimeoutError
from tests.service.api.test_generate import events_of
from tests.service.fake_engine import WORDS, FakeEngine, http_client

pytestmark = pytest.mark.anyio
TEXT = "".join(WORDS)
HELLO = [{"role": "user", "content": "Hello."}]


async def post(body: dict[str, Any], engine: Any = None) -> httpx.Response:
    async with http_client(engine or FakeEngine()) as client:
        return await client.post("/v1/chat/completions", json={"messages": HELLO, **body})


async def prompt_of(body: dict[str, Any]) -> Any:
    engine = FakeEngine()
    response = await post(body, engine)
    assert response.status_code == 200, response.text
    return engine.requests[0]


async def test_an_answer_is_a_message_with_the_sparsity_block() -> None:
    answer = (await post({"n": 2})).json()
    ChatResponse.model_validate(answer, extra="forbid")
    assert answer["id"].startswith("chatcmpl-")
    assert answer["object"] == "chat.completion"
    assert [choice["message"]["content"] for choice in answer["choices"]] == [TEXT, TEXT]
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["choices"][0]["logprobs"] is None
    assert answer["sparsity"]["method"] == "streaming"


async def test_a_stream_begins_with_the_role_of_each_choice() -> None:
    body = {"n": 2, "stream": True, "stream_options": {"include_usage": True}}
    chunks = events_of((await post(body)).text)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    for index in (0, 1):
        deltas = [
            c["choices"][0]["delta"]
            for c in chunks
            if c["choices"] and c["choices"][0]["index"] == index
        ]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert "".join(delta.get("content", "") for delta in deltas) == TEXT
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 8
    assert chunks[-1]["sparsity"] == chunks[-2]["sparsity"]
    assert [chunk for chunk in chunks if "sparsity" in chunk] == chunks[-2:]


async def test_logprobs_are_one_record_per_token() -> None:
    choice = (await post({"logprobs": True, "top_logprobs": 1})).json()["choices"][0]
    last = choice["logprobs"]["content"][-1]
    alone = {"token": "!", "logprob": -0.5, "bytes": [33]}
    assert last == {**alone, "top_logprobs": [alone]}
    chunks = events_of((await post({"logprobs": True, "stream": True})).text)
    tokens = [
        record["token"]
        for chunk in chunks
        if chunk["choices"][0]["logprobs"]
        for record in chunk["choices"][0]["logprobs"]["content"]
    ]
    assert tokens == ["<|bos|>", "<|eos|>", "<|pad|>", "!"]


async def test_a_model_without_a_template_gets_the_plain_one() -> None:
    messages = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]},
        {"role": "assistant", "content": "C"},
        {"role": "user", "name": "Ann", "content": "D"},
    ]
    request = await prompt_of({"messages": messages, "stop": "!"})
    assert (
        request.prompt == "System: Be kind.\n\nUser: A\nB\n\nAssistant: C\n\nAnn: D\n\nAssistant:"
    )
    assert request.sampling.stop == ("!", "\n\nUser:", "\n\nAnn:")
    assert request.adds_special_tokens


async def test_the_last_turn_can_be_gone_on_with() -> None:
    messages = [*HELLO, {"role": "assistant", "content": "I am"}]
    body = {"messages": messages, "continue_final_message": True, "add_generation_prompt": False}
    assert (await prompt_of(body)).prompt == "User: Hello.\n\nAssistant: I am"


async def test_an_answer_may_be_sent_back_as_it_came() -> None:
    message = (await post({})).json()["choices"][0]["message"]
    request = await prompt_of({"messages": [*HELLO, message, *HELLO]})
    assert f"Assistant: {TEXT}" in request.prompt


async def test_without_a_limit_the_context_is_the_limit_and_the_new_name_wins() -> None:
    assert (await prompt_of({})).sampling.max_tokens == 2**31 - 1
    assert (await prompt_of({"max_tokens": 5})).sampling.max_tokens == 5
    both = {"max_tokens": 5, "max_completion_tokens": 7}
    assert (await prompt_of(both)).sampling.max_tokens == 7


async def test_what_changes_nothing_is_taken() -> None:
    harmless = {
        "user": "u",
        "store": False,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "tools": [],
        "tool_choice": "none",
        "modalities": ["text"],
        "n": 1,
        "prompt_cache_key": "k",
        "top_logprobs": 0,
        "audio": None,
    }
    assert (await post(harmless)).status_code == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": None}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x", "surprise": 1}]}, "messages"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"store": True}, "store"),
        ({"store": 0}, "store"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": 2}, "logprobs"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_completion_tokens": 2, "min_tokens": 3}, "min_tokens"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"prompt": "x"}, "prompt"),
    ],
)
async def test_what_cannot_be_served_is_refused_and_named(body: dict[str, Any], param: str) -> None:
    response = await post(body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


async def test_a_stream_whose_turn_does_not_come_is_refused_before_it_begins() -> None:
    engine = FakeEngine()
    engine.late = QueueTimeoutError("Late.")
    response = await post({"stream": True, "method": "dense"}, engine)
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-sparse-method"] == "dense"
    assert engine.num_running == 0
