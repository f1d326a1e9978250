"""What OpenAI's own client is told of tokens, held to what transformers alone computes."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.e2e.conftest import CHAT, PROMPT, ROOT

pytestmark = pytest.mark.timeout(300)


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
