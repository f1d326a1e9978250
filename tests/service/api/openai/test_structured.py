"""response_format and structured_outputs, up to the engine."""

from typing import Any

import orjson
import pytest

from service.engine.grammar import Grammar
from tests.service.fake_engine import FakeEngine, http_client

pytestmark = pytest.mark.anyio
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
ANY_OBJECT = '{"type":"object"}'


async def post(body: dict[str, Any], engine: Any = None, path: str = "/v1/completions") -> Any:
    prompt = {"prompt": "p"} if path == "/v1/completions" else {"messages": [USER]}
    async with http_client(engine or FakeEngine()) as client:
        return await client.post(path, json={**prompt, **body})


USER = {"role": "user", "content": "x"}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    ("body", "kind", "source"),
    [
        ({"response_format": JSON_SCHEMA}, "json_schema", orjson.dumps(SCHEMA).decode()),
        ({"response_format": {"type": "json_object"}}, "json_schema", ANY_OBJECT),
        ({"response_format": {"type": "regex", "regex": "a+"}}, "regex", "a+"),
        ({"structured_outputs": {"json": SCHEMA}}, "json_schema", orjson.dumps(SCHEMA).decode()),
        ({"structured_outputs": {"json": ANY_OBJECT}}, "json_schema", ANY_OBJECT),
        ({"structured_outputs": {"json_object": True}}, "json_schema", ANY_OBJECT),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "choice", '["a","b"]'),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, "lark", 'start: "a"'),
    ],
)
async def test_a_format_becomes_a_grammar(
    path: str, body: dict[str, Any], kind: Any, source: str
) -> None:
    engine = FakeEngine()
    assert (await post(body, engine, path)).status_code == 200
    (param,) = body
    assert engine.requests[0].sampling.grammar == Grammar(kind, source, param)


@pytest.mark.parametrize("body", [{}, {"response_format": {"type": "text"}}])
async def test_without_a_format_the_text_is_free(body: dict[str, Any]) -> None:
    engine = FakeEngine()
    assert (await post(body, engine)).status_code == 200
    assert engine.requests[0].sampling.grammar is None


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": {}}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "text", "regex": "a"}}, "response_format"),
        ({"response_format": {"type": "regex", "regex": ""}}, "response_format"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"surprise": 1}}, "structured_outputs"),
        (
            {"response_format": JSON_SCHEMA, "structured_outputs": {"regex": "a"}},
            "structured_outputs",
        ),
        ({"response_format": JSON_SCHEMA, "ignore_eos": True}, "ignore_eos"),
        ({"response_format": JSON_SCHEMA, "min_tokens": 2}, "min_tokens"),
    ],
)
async def test_what_is_no_format_is_refused(body: dict[str, Any], param: str) -> None:
    response = await post(body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
