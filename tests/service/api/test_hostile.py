"""The tables of bad requests, sent to a real server: one shape of refusal, and no trace is left."""

import io
import json
import logging
import re
import secrets
from pathlib import Path

import httpx
import pytest

from service.logs import JsonFormatter
from service.settings import Settings
from tests.service.api.hostile_requests import (
    BODIES,
    HEADERS,
    JSON,
    MEGABYTE,
    PRIVATE,
    QUERIES,
    ROUTES,
    body_for,
    fields,
    table,
)
from tests.service.fake_engine import FakeEngine, running_server

ROOT = Path(__file__).parent.parent.parent.parent
TYPES = {400: "BadRequestError", 413: "PayloadTooLargeError"}


@pytest.fixture(scope="module")
def log():
    """All that is logged while the table is sent."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel("DEBUG")
    yield stream
    root.removeHandler(handler)
    root.setLevel(level)


@pytest.fixture(scope="module")
def engine():
    return FakeEngine(Settings())


@pytest.fixture(scope="module")
def client(engine, log):
    with (
        running_server(engine) as address,
        httpx.Client(base_url=address, timeout=60) as one,
    ):
        yield one


def check(response: httpx.Response, status: int, param: str | None) -> None:
    assert response.status_code == status, response.text
    assert len(response.content) <= 2048
    assert response.headers["content-type"] == JSON
    assert re.fullmatch("[0-9a-f]{32}", response.headers["x-request-id"])
    assert "x-injected" not in response.headers
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert error == {
        "message": error["message"],
        "type": TYPES[status],
        "param": param,
        "code": status,
    }
    assert error["message"]
    assert error["message"].isprintable()
    for trace in (PRIVATE, str(ROOT), "site-packages", ".py", "Traceback", "/root", "/home"):
        assert trace not in response.text


def check_untouched(client: httpx.Client, engine: FakeEngine) -> None:
    """Nothing reached the engine, and the next request is served on the same connection."""
    assert not engine.requests
    answer = client.post("/generate", json={"prompt": "p"})
    assert answer.status_code == 200
    engine.requests.clear()


@pytest.mark.parametrize(("route", "body", "status", "param"), table())
def test_a_bad_body(client, engine, route, body, status, param):
    response = client.post(route, content=body, headers={"Content-Type": JSON})
    check(response, status, param)
    check_untouched(client, engine)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("query", "param"), QUERIES.values(), ids=QUERIES)
def test_a_bad_query(client, engine, route, query, param):
    response = client.post(
        f"{route}?{query}", content=body_for(route, fields()), headers={"Content-Type": JSON}
    )
    check(response, 400, param)
    check_untouched(client, engine)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("headers", HEADERS.values(), ids=HEADERS)
def test_a_bad_content_type(client, engine, route, headers):
    check(client.post(route, content=body_for(route, fields()), headers=headers), 400, None)
    check_untouched(client, engine)


def test_the_table_is_long_enough():
    assert len(BODIES) + len(QUERIES) + len(HEADERS) >= 100


@pytest.mark.parametrize("route", ROUTES)
def test_a_refusal_names_the_method_as_soon_as_it_is_known(client, route):
    def names(query: str, body: bytes) -> tuple[str | None, str | None]:
        response = client.post(
            route + query, content=body_for(route, body), headers={"Content-Type": JSON}
        )
        assert response.status_code == 400
        headers = response.headers
        return headers.get("x-sparse-method"), headers.get("x-sparse-version")

    assert names("?method=dense", b"{") == ("dense", "v1")
    assert names("?method=dense&version=v1", fields(n=0)) == ("dense", "v1")
    assert names("", fields(method="streaming", method_params={"nope": 1})) == ("streaming", "v1")
    assert names("?method=nope", fields()) == (None, None)
    assert names("", b"{") == (None, None)


def series(client: httpx.Client) -> set[str]:
    lines = client.get("/metrics").text.splitlines()
    return {line.rpartition(" ")[0] for line in lines if not line.startswith("#")}


def test_no_client_can_make_metrics_grow(client, engine):
    def send_all() -> None:
        for route in ROUTES:
            word = secrets.token_hex(8)
            headers = {"Content-Type": JSON, "X-Request-Id": word}
            client.post(route, content=body_for(route, fields()), headers=headers)
            client.post(
                f"{route}?method={word}", content=body_for(route, fields()), headers=headers
            )
            client.post(
                f"{route}?method=dense&version={word}",
                content=body_for(route, fields()),
                headers=headers,
            )
            client.post(f"{route}?{word}=1", content=body_for(route, fields()), headers=headers)
            client.post(route, content=body_for(route, fields(method=word)), headers=headers)
            client.post(route, content=body_for(route, fields(**{word: 1})), headers=headers)
            client.post(f"{route}/{word}", content=body_for(route, fields()), headers=headers)
            client.request(word[:4].upper(), route, headers=headers)
            client.get(f"/methods/{word}")
            client.get(f"/{word}")

    send_all()
    series(client)  # which has one of its own
    before = series(client)
    for _ in range(20):
        send_all()
    assert series(client) == before


def test_nothing_of_a_prompt_was_logged(client, log):
    for route in ROUTES:
        body = body_for(route, fields())
        response = client.post(route, content=body, headers={"Content-Type": JSON})
        assert response.status_code == 200
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    ours = [line for line in lines if not line["logger"].startswith(("httpx", "httpcore"))]
    assert any(line["logger"] == "service.access" for line in ours)
    assert PRIVATE not in json.dumps(ours)
    assert MEGABYTE[:100] not in json.dumps(ours)


def test_other_origins_are_told_nothing(client):
    headers = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    preflights = [client.options(route, headers=headers) for route in ROUTES]
    for response in (*preflights, client.get("/methods", headers=headers)):
        assert not [name for name in response.headers if name.startswith("access-control")]
    assert {response.status_code for response in preflights} == {405}
