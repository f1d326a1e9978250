"""OpenAI's own client, unchanged, against a real server process."""

import asyncio
import json
from typing import Any, cast

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.e2e.conftest import ROOT

pytestmark = pytest.mark.timeout(300)
PROMPT = "The old house stood at the end of the road, and"
CHAT: list[Any] = [{"role": "user", "content": "Who lives in the old house?"}]


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as one:
        yield one


@pytest.fixture(scope="module")
def model(client):
    (card,) = client.models.list().data
    return card.id


@pytest.fixture(scope="module")
def plain_logprobs():
    """Log-probabilities behind each position of a list of tokens, by transformers alone."""
    directory = ROOT / "service" / "default_model"
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    @torch.inference_mode()
    def logprobs(ids):
        return plain(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)

    return logprobs


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "service" / "default_model")


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


def test_logprobs_of_a_completion_are_those_of_the_plain_model(
    client, model, plain_logprobs, tokenizer
):
    answer = client.completions.create(
        model=model,
        prompt=PROMPT,
        max_tokens=12,
        temperature=1.0,
        seed=1,
        logprobs=5,
        extra_body={"method": "dense", "ignore_eos": True},
    )
    given = answer.choices[0].logprobs
    assert "".join(given.tokens) == answer.choices[0].text
    offsets = [answer.choices[0].text.index(given.tokens[0])]
    for token in given.tokens[:-1]:
        offsets.append(offsets[-1] + len(token))
    assert given.text_offset == offsets
    prompt = tokenizer(PROMPT).input_ids
    ids = [tokenizer.encode(token, add_special_tokens=False) for token in given.tokens]
    assert all(len(one) == 1 for one in ids)
    chosen = [one[0] for one in ids]
    expected = plain_logprobs(prompt + chosen)[len(prompt) - 1 :]
    for place, token_id in enumerate(chosen):
        row = expected[place]
        assert given.token_logprobs[place] == pytest.approx(float(row[token_id]), abs=1e-3)
        best = row.topk(5)
        top = given.top_logprobs[place]
        assert 5 <= len(top) <= 6
        for index, value in zip(best.indices.tolist(), best.values.tolist(), strict=True):
            assert top[tokenizer.decode([index])] == pytest.approx(value, abs=1e-3)


def test_logprobs_of_an_echoed_prompt_are_those_of_the_plain_model(
    client, model, plain_logprobs, tokenizer
):
    prompt = tokenizer(PROMPT).input_ids
    answer = client.completions.create(
        model=model,
        prompt=PROMPT,
        max_tokens=1,
        temperature=0,
        echo=True,
        logprobs=2,
        extra_body={"method": "dense"},
    )
    given = answer.choices[0].logprobs
    assert answer.choices[0].text.startswith(PROMPT)
    assert len(given.tokens) == len(prompt) + 1
    assert given.token_logprobs[0] is None
    assert "".join(given.tokens[1:]) == answer.choices[0].text
    expected = plain_logprobs(prompt)
    for place in range(1, len(prompt)):
        row = expected[place - 1]
        assert given.token_logprobs[place] == pytest.approx(float(row[prompt[place]]), abs=1e-3)
        likeliest = tokenizer.decode([int(row.argmax())])
        assert given.top_logprobs[place][likeliest] == pytest.approx(float(row.max()), abs=1e-3)


def test_logprobs_of_a_chat_are_those_of_the_plain_model(client, model, plain_logprobs, tokenizer):
    answer = client.chat.completions.create(
        model=model,
        messages=CHAT,
        max_completion_tokens=10,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
        extra_query={"method": "dense"},
    )
    records = answer.choices[0].logprobs.content
    prompt = tokenizer(f"User: {CHAT[0]['content']}\n\nAssistant:").input_ids
    chosen: list[int] = []
    for record in records:
        row = plain_logprobs(prompt + chosen)[-1]
        best = row.topk(3)
        assert [bytes(top.bytes).decode() for top in record.top_logprobs] == [
            tokenizer.decode([index]) for index in best.indices.tolist()
        ]
        values = [top.logprob for top in record.top_logprobs]
        assert values == pytest.approx(best.values.tolist(), abs=1e-3)
        assert record.logprob == pytest.approx(float(row.max()), abs=1e-3)
        chosen.append(int(row.argmax()))
    assert answer.choices[0].message.content == tokenizer.decode(chosen).split("\n\nUser:")[0]


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


def test_stops_biases_and_lengths_are_honoured(client, model, tokenizer):
    fields: dict[str, Any] = {"model": model, "prompt": PROMPT, "temperature": 0}
    free = client.completions.create(**fields, max_tokens=20)
    assert free.choices[0].finish_reason == "length"
    word = free.choices[0].text.split()[2]
    stopped = client.completions.create(**fields, max_tokens=20, stop=word)
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].model_extra["stop_reason"] == word
    assert free.choices[0].text.startswith(stopped.choices[0].text)
    (token,) = tokenizer.encode(" the", add_special_tokens=False)
    biased = client.completions.create(**fields, max_tokens=3, logit_bias={str(token): 100})
    assert biased.choices[0].text == " the the the"
    echoed = client.completions.create(**fields, max_tokens=20, echo=True)
    assert echoed.choices[0].text == PROMPT + free.choices[0].text


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
