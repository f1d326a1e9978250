"""Every refusal: the right status, the field at fault, one bounded shape."""

import contextlib
from typing import Any

import httpx
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api.body import validate_body
from service.api.errors import describe_error
from service.api.schemas import GenerateRequest
from service.errors import BadRequestError
from service.settings import Settings
from tests.service.fake_engine import FakeEngine, http_client

pytestmark = pytest.mark.anyio


async def send(
    content: bytes, query: str = "", content_type: str | None = "application/json"
) -> httpx.Response:
    headers = {} if content_type is None else {"Content-Type": content_type}
    async with http_client(FakeEngine()) as client:
        return await client.post("/generate" + query, content=content, headers=headers)


def check_error(response: httpx.Response, status: int, param: str | None = None) -> str:
    assert response.status_code == status
    assert len(response.content) <= 2048
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == status
    assert error["param"] == param
    assert "Traceback" not in error["message"]
    assert ".py" not in error["message"]
    return str(error["message"])


@pytest.mark.parametrize(
    ("content", "content_type"),
    [
        (b"", "application/json"),
        (b"{", "application/json"),
        (b"[1]", "application/json"),
        (b"null", "application/json"),
        (b'"text"', "application/json"),
        (b"[" * 100_000, "application/json"),
        (b'{"prompt": "\\ud800"}', "application/json"),
        (b'{"prompt": "\xff"}', "application/json"),
        (b'{"prompt": "p", "temperature": NaN}', "application/json"),
        (b'{"prompt": "p", "temperature": Infinity}', "application/json"),
        (b'{"prompt": "p"}', "text/plain"),
        (b'{"prompt": "p"}', None),
    ],
)
async def test_what_is_no_json_object_is_refused(content: bytes, content_type: str | None) -> None:
    check_error(await send(content, content_type=content_type), 400)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", "5"),
        ("max_tokens", True),
        ("max_tokens", 5.5),
        ("max_tokens", 0),
        ("max_tokens", None),
        ("min_tokens", -1),
        ("min_tokens", 129),
        ("temperature", "1"),
        ("temperature", True),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("seed", 2**63),
        ("seed", 1.5),
        ("stop", ""),
        ("stop", [""]),
        ("stop", 5),
        ("stop", ["x"] * 17),
        ("stop", "x" * 257),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [0] * 65),
        ("logprobs", 21),
        ("logprobs", True),
        ("n", 0),
        ("n", 17),
        ("stream", "true"),
        ("stream", 1),
        ("sparsity_detail", "all"),
        ("ignore_eos", None),
        ("method", 5),
        ("method_params", []),
        ("prompt", 5),
        ("prompt", ""),
        ("maximum_tokens", 5),
    ],
)
async def test_a_bad_field_is_named(field: str, value: object) -> None:
    body = {"prompt": "p", field: value}
    check_error(await send(orjson.dumps(body)), 400, field)


async def test_an_overflowing_number_is_refused() -> None:
    check_error(await send(b'{"prompt": "p", "temperature": 1e999}'), 400)


async def test_a_misspelt_field_gets_a_hint() -> None:
    message = check_error(await send(b'{"prompt": "p", "max_token": 5}'), 400, "max_token")
    assert "'max_tokens'" in message


async def test_choices_need_a_temperature() -> None:
    check_error(await send(b'{"prompt": "p", "n": 2, "temperature": 0}'), 400, "n")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "p", "prompt_token_ids": [1]}, "prompt"),
        ({"prompt_token_ids": []}, "prompt_token_ids"),
        ({"prompt_token_ids": [True]}, "prompt_token_ids"),
        ({"prompt_token_ids": [-1]}, "prompt_token_ids"),
        ({"prompt_token_ids": ["x"] * 100_000}, "prompt_token_ids"),
    ],
)
async def test_exactly_one_proper_prompt_is_needed(body: dict[str, Any], param: str) -> None:
    check_error(await send(orjson.dumps(body)), 400, param)


async def test_a_prompt_that_does_not_fit_is_refused_with_both_numbers() -> None:
    message = check_error(await send(orjson.dumps({"prompt": "p" * 2000})), 400, "prompt")
    assert "2000" in message
    assert "1000" in message


@pytest.mark.parametrize(
    ("query", "fields", "param"),
    [
        ("?method=nope", {}, "method"),
        ("?method=", {}, "method"),
        ("", {"method": "nope" * 1000}, "method"),
        ("?method=dense&version=v99", {}, "version"),
        ("", {"method": "dense", "version": "1"}, "version"),
        ("?method=dense", {"method": "streaming"}, "method"),
        ("?version=v1", {"version": "v2"}, "version"),
        ("?method=dense&method=dense", {}, "method"),
        ("?metod=dense", {}, "metod"),
        ("", {"method_params": {"nope": 1}}, "method_params"),
        ("", {"method_params": {"window_blocks": -1}}, "method_params"),
        ("", {"method_params": {"x" * 10_000: 1}}, "method_params"),
    ],
)
async def test_a_method_that_cannot_be_resolved_is_refused(
    query: str, fields: dict[str, Any], param: str
) -> None:
    body = orjson.dumps({"prompt": "p", **fields})
    check_error(await send(body, query), 400, param)


async def test_a_contradiction_names_both_and_an_unknown_method_the_known_ones() -> None:
    message = check_error(
        await send(b'{"prompt": "p", "method": "streaming"}', "?method=dense"), 400, "method"
    )
    assert "'dense'" in message
    assert "'streaming'" in message
    message = check_error(await send(b'{"prompt": "p"}', "?method=strming"), 400, "method")
    assert "Did you mean 'streaming'" in message


@pytest.mark.parametrize(
    ("query", "fields", "method", "origin"),
    [
        ("", {}, "streaming", "default"),
        ("?method=dense", {}, "dense", "query"),
        ("?version=v1", {}, "streaming", "query"),
        ("", {"method": "dense"}, "dense", "body"),
        ("", {"version": "v1"}, "streaming", "body"),
        ("?method=dense", {"method": "dense"}, "dense", "query"),
        ("?version=v1", {"method": "dense"}, "dense", "body"),
    ],
)
async def test_the_answer_says_where_the_method_came_from(
    query: str, fields: dict[str, Any], method: str, origin: str
) -> None:
    answer = (await send(orjson.dumps({"prompt": "p", **fields}), query)).json()
    assert (answer["sparsity"]["method"], answer["sparsity"]["resolved_from"]) == (method, origin)


async def test_knobs_come_back_resolved() -> None:
    body = {"prompt": "p", "method_params": {"window_blocks": 3}}
    answer = (await send(orjson.dumps(body))).json()
    expected = {"dense_below": None, "sink_blocks": 1, "window_blocks": 3}
    assert answer["sparsity"]["params"] == expected


async def test_unknown_routes_and_methods_have_the_same_shape() -> None:
    async with http_client(FakeEngine()) as client:
        check_error(await client.get("/nope"), 404)
        check_error(await client.get("/generate/"), 404)
        response = await client.get("/generate")
        check_error(response, 405)
        assert response.headers["allow"] == "POST"


async def test_a_bug_of_ours_tells_nothing_and_is_not_retried() -> None:
    engine = FakeEngine()
    engine.refusal = KeyError("/secret/path.py")
    async with http_client(engine) as client:
        response = await client.post("/generate", json={"prompt": "p"})
    assert "secret" not in check_error(response, 500)
    assert response.headers["x-should-retry"] == "false"
    assert len(response.headers["x-request-id"]) == 32


@pytest.mark.parametrize("size", [1023, 1024, 1025])
async def test_the_body_limit_is_exact(size: int) -> None:
    limited = Settings(max_body_bytes=1024)
    body = b'{"prompt": "' + b"p" * (size - 14) + b'"}'
    assert len(body) == size

    async def chunks():  # no content-length
        yield body[:1000]
        yield body[1000:]

    async with http_client(FakeEngine(limited)) as client:
        headers = {"Content-Type": "application/json"}
        for content in (body, chunks()):
            response = await client.post("/generate", content=content, headers=headers)
            assert response.status_code != 413 or size > 1024
            if size > 1024:
                check_error(response, 413)


@given(st.text(max_size=3000), st.text(max_size=3000))
def test_an_error_is_bounded_whatever_its_words(message: str, param: str) -> None:
    body = orjson.dumps(describe_error(BadRequestError(message, param)).model_dump())
    assert len(body) <= 2048


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(sorted(GenerateRequest.model_fields)), ANY_JSON))
def test_any_body_is_taken_or_refused_as_a_bad_request(body: dict[str, Any]) -> None:
    with contextlib.suppress(BadRequestError):  # and nothing else
        request = validate_body(GenerateRequest, body)
        assert request.sampling().max_tokens >= 1
