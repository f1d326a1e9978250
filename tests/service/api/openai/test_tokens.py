"""POST /tokenize and /detokenize with the built-in tokenizer."""

from typing import Any

import pytest

from tests.service.fake_engine import FakeEngine, http_client

pytestmark = pytest.mark.anyio
TEXT = "It's a naïve test — 🚀."


async def post(path: str, body: dict[str, Any]) -> Any:
    async with http_client(FakeEngine()) as client:
        return await client.post(path, json=body)


async def test_tokens_are_those_of_a_prompt_and_come_back_as_its_text() -> None:
    answer = (await post("/tokenize", {"prompt": TEXT, "return_token_strs": True})).json()
    assert answer["tokens"] == FakeEngine.tokenizer.encode(TEXT)
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == 1000
    assert answer["token_strs"][0] == "<|bos|>"
    bare = (await post("/tokenize", {"prompt": TEXT, "add_special_tokens": False})).json()
    assert bare["tokens"] == answer["tokens"][1:]
    assert bare["token_strs"] is None
    back = (await post("/detokenize", {"tokens": answer["tokens"]})).json()
    assert back == {"prompt": "<|bos|>" + TEXT}


async def test_a_chat_is_cut_as_the_chat_route_would() -> None:
    messages = [{"role": "user", "content": "Hi"}]
    answer = (await post("/tokenize", {"messages": messages})).json()
    assert answer["tokens"] == FakeEngine.tokenizer.encode("User: Hi\n\nAssistant:")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "x"}]}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [4096]}, "tokens"),
        ("/detokenize", {"tokens": [2**40]}, "tokens"),
    ],
)
async def test_bad_input_is_refused(path: str, body: dict[str, Any], param: str) -> None:
    response = await post(path, body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
async def test_another_model_does_not_exist(path: str) -> None:
    body = {"tokens": [5]} if path == "/detokenize" else {"prompt": "a"}
    assert (await post(path, {**body, "model": "other"})).status_code == 404
