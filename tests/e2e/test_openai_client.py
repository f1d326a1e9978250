"""OpenAI's own client, unchanged, against a real server process."""

import asyncio
import json
from typing import Any, cast

import openai
import pytest

from tests.e2e.conftest import CHAT, PROMPT

pytestmark = pytest.mark.timeout(300)


def test_the_model_is_listed_and_shown(client, model):
    assert client.models.retrieve(model).id == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("no-such-model")
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="no-such-model", prompt="x")


def test_a_completion_and_its_stream_say_the_same(client, model):
    fields: dict[str, Any] = {
        "model": model,
        "prompt": PROMPT,
        "max_tokens": 24,
        "temperature": 0.8,
        "seed": 3,
        "n": 2,
    }
    whole = client.completions.create(**fields)
    texts = dict.fromkeys(range(2), "")
    usage = sparsity = None
    for chunk in client.completions.create(
        **fields, stream=True, stream_options={"include_usage": True}
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
        usage = chunk.usage or usage
        sparsity = (chunk.model_extra or {}).get("sparsity", sparsity)
    assert [choice.text for choice in whole.choices] == list(texts.values())
    assert texts[0] != texts[1]
    assert usage == whole.usage
    assert usage.completion_tokens == 48
    assert sparsity == whole.model_extra["sparsity"]


def test_several_prompts_get_what_each_gets_alone(client, model):
    prompts = [PROMPT, "It was", "Nobody knew"]
    fields: dict[str, Any] = {"model": model, "temperature": 0, "max_tokens": 12}
    alone = [client.completions.create(prompt=p, **fields).choices[0].text for p in prompts]
    together = client.completions.create(prompt=prompts, **fields)
    assert [choice.text for choice in together.choices] == alone
    tokens = [
        client.post("/../tokenize", body={"prompt": p}, cast_to=dict[str, Any])["tokens"]
        for p in prompts
    ]
    by_tokens = client.completions.create(prompt=tokens, **fields)
    assert [choice.text for choice in by_tokens.choices] == alone


def test_a_chat_and_its_stream_say_the_same(client, model):
    fields: dict[str, Any] = {
        "model": model,
        "messages": CHAT,
        "max_completion_tokens": 20,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**fields)
    stream = client.chat.completions.create(**fields, stream=True)
    deltas = [chunk.choices[0].delta for chunk in stream]
    assert deltas[0].role == "assistant"
    assert "".join(d.content or "" for d in deltas) == whole.choices[0].message.content
    again = [*CHAT, whole.choices[0].message, {"role": "user", "content": "And now?"}]
    assert client.chat.completions.create(**{**fields, "messages": again}).usage.prompt_tokens > (
        whole.usage.prompt_tokens
    )


def test_a_method_is_chosen_by_extra_query_or_extra_body(client, model):
    fields: dict[str, Any] = {"model": model, "prompt": PROMPT, "max_tokens": 2}
    for extra in (
        {"extra_query": {"method": "streaming", "version": "v1"}},
        {"extra_body": {"method": "streaming", "method_params": {"window_blocks": 2}}},
        {"extra_body": {"vllm_xargs": {"method": "streaming"}}},
    ):
        answer = client.completions.create(**fields, **extra)
        assert answer.model_extra["sparsity"]["method"] == "streaming"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(
            **fields, extra_query={"method": "dense"}, extra_body={"method": "streaming"}
        )
    assert caught.value.param == "method"
    raw = client.completions.with_raw_response.create(**fields)
    assert raw.headers["x-sparse-method"] == "flash_skip_softmax"


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 3},
        {"logit_bias": {"99999": 1}},
        {"n": 2, "temperature": 0},
        {"suffix": "x"},
        {"extra_body": {"surprise": 1}},
        {"prompt": [5_000]},
        {"prompt": ""},
    ],
)
def test_a_bad_request_is_the_client_s_bad_request_error(client, model, fields):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{"model": model, "prompt": "x", **fields})
    assert cast(dict[str, Any], caught.value.body)["code"] == 400
    assert caught.value.request_id


def test_an_answer_is_held_to_a_json_schema(client, model):
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {
            "who": {"type": "string", "maxLength": 12},
            "rooms": {"type": "integer", "minimum": 1, "maximum": 30},
            "style": {"enum": ["old", "new"]},
        },
        "required": ["who", "rooms", "style"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=model,
        messages=CHAT,
        seed=1,
        n=3,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    )
    for choice in answer.choices:
        house = json.loads(choice.message.content)
        assert choice.finish_reason == "stop"
        assert set(house) == {"who", "rooms", "style"}
        assert len(house["who"]) <= 12
        assert 1 <= house["rooms"] <= 30
    chosen = client.completions.create(
        model=model,
        prompt="Yes or no?",
        extra_body={"structured_outputs": {"choice": ["yes", "no"]}},
    )
    assert chosen.choices[0].text in {"yes", "no"}
    with pytest.raises(openai.BadRequestError, match="not usable") as caught:
        client.completions.create(
            model=model,
            prompt="x",
            extra_body={"response_format": {"type": "regex", "regex": "(["}},
        )
    assert caught.value.param == "response_format"


def test_tools_are_refused_clearly(client, model):
    tools: Any = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    with pytest.raises(openai.BadRequestError, match="'tools'"):
        client.chat.completions.create(model=model, messages=CHAT, tools=tools)


def test_the_asynchronous_client_streams_side_by_side(server, model):
    async def texts():
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none") as client:

            async def text(index):
                stream = await client.completions.create(
                    model=model,
                    prompt=f"{PROMPT} {index}",
                    max_tokens=16,
                    stream=True,
                    temperature=0,
                )
                return "".join([c.choices[0].text async for c in stream if c.choices])

            together = await asyncio.gather(*(text(i) for i in range(6)))
            return together, [await text(i) for i in range(6)]

    together, alone = asyncio.run(texts())
    assert together == alone


def test_a_stream_of_several_prompts_with_a_deadline_ends(client, model):
    chunks = client.completions.create(
        model=model,
        prompt=[PROMPT, PROMPT + " the", PROMPT + " then"],
        max_tokens=1,
        stream=True,
        extra_body={"timeout_s": 60},
        timeout=60,
    )
    endings = {c.choices[0].index: c.choices[0].finish_reason for c in chunks if c.choices}
    assert endings == dict.fromkeys(range(3), "length")


def test_a_client_that_leaves_a_stream_frees_its_pages(server, client, model):
    server.wait_metric("running_requests", 0)
    before = server.metric("aborted_requests_total", reason="client")
    with client.completions.create(
        model=model, prompt=PROMPT, max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        next(iter(stream))
    server.wait_metric("aborted_requests_total", before + 1, reason="client")
    server.wait_metric("kv_cache_pages_used", 0)


def test_a_running_request_can_be_cancelled(server, client, model):
    with client.chat.completions.create(
        model=model,
        messages=CHAT,
        max_completion_tokens=4000,
        stream=True,
        extra_body={"ignore_eos": True},
    ) as stream:
        chunks = iter(stream)
        first = next(chunks)
        answer = server.client.post(f"/requests/{first.id}/cancel")
        assert answer.json() == {"id": first.id, "cancelled": True}
        reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices]
    assert reasons[-1] == "abort"
    assert len(reasons) < 3900
    server.wait_metric("kv_cache_pages_used", 0)
