"""Which routes need a key, which origins may call, and what every answer carries."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from service.settings import Settings
from tests.service.fake_engine import FakeEngine, fake_app, http_client

pytestmark = pytest.mark.anyio
PROBES = {"/health", "/health/live", "/health/ready"}  # all that is open, by design
GUARDED = Settings().model_copy(update={"api_keys": (SecretStr("right"),)})


def walk(routes: Iterable[Any]) -> Iterator[tuple[str, str]]:
    """(verb, path) of every route, of included and mounted applications, too."""
    for route in routes:
        inner = getattr(route, "original_router", route)
        if inner is not route or getattr(route, "routes", None):
            yield from walk(inner.routes)
        else:
            for verb in route.methods:
                yield verb, re.sub(r"{\w+}", "dense", route.path)


@pytest.mark.parametrize("metrics_need_key", [False, True])
async def test_every_route_there_is_needs_a_key_except_for_probes(metrics_need_key: bool) -> None:
    settings = GUARDED.model_copy(update={"metrics_need_key": metrics_need_key})
    public = PROBES if metrics_need_key else PROBES | {"/metrics"}
    engine = FakeEngine(settings)
    routes = set(walk(fake_app(engine).routes))
    known = {("POST", "/generate"), ("GET", "/v1/methods/dense"), ("GET", "/openapi.json")}
    known |= {("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("POST", "/tokenize")}
    known |= {("POST", "/requests/dense/cancel"), ("GET", "/v1/models"), ("GET", "/server_info")}
    assert known | {("GET", path) for path in PROBES} < routes, "not all routes were found"
    async with http_client(engine) as client:
        for verb, path in sorted(routes):
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"X-API-Key": ""}):
                response = await client.request(verb, path, headers=headers)
                assert (response.status_code != 401) == (path in public), (verb, path)
            response = await client.request(verb, path, headers={"X-API-Key": "right"})
            assert response.status_code != 401, (verb, path)


@pytest.mark.parametrize(
    "path",
    [
        "/health/live/../../generate",
        "/health/%2e%2e/generate",
        "/health/live%2f..%2f..%2fgenerate",
        "/health/live/",
        "/health/live;/generate",
        "//health/live",
        "/HEALTH",
        "/generate?/health/live",
    ],
)
async def test_a_path_that_only_looks_like_a_probe_needs_a_key(path: str) -> None:
    async with http_client(FakeEngine(GUARDED)) as client:
        for verb in ("GET", "POST"):
            response = await client.request(verb, httpx.URL("http://test", raw_path=path.encode()))
            assert response.status_code == 401


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer right\t\x00"},
        {"Authorization": "Bearer " + "x" * 60_000},
        {"Authorization": "Bearer Bearer right"},
        {"Authorization": "bearer"},
        {"Authorization": "Bearer \xff\xfe"},
        {"X-API-Key": "right, right"},
        {"Cookie": "Authorization=right"},
    ],
)
async def test_what_is_not_quite_the_key_is_refused(headers: dict[str, str]) -> None:
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    async with http_client(FakeEngine(GUARDED)) as client:
        response = await client.get("/methods", headers=raw)
        assert response.status_code == 401
        assert "right" not in response.text


async def test_a_page_of_another_origin_may_call_only_if_the_operator_says_so() -> None:
    settings = GUARDED.model_copy(update={"cors_origins": ("https://good.example",)})
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "X-API-Key"}
    async with http_client(FakeEngine(settings)) as client:
        for origin, allowed in (("https://good.example", True), ("https://evil.example", False)):
            asked = await client.options("/generate", headers={"Origin": origin, **asks})
            assert (asked.status_code == 200) == allowed
            assert ("access-control-allow-origin" in asked.headers) == allowed
            headers = {"Origin": origin, "X-API-Key": "right"}
            given = await client.post("/generate", json={"prompt": "p"}, headers=headers)
            assert given.status_code == 200
            assert given.headers.get("access-control-allow-origin") == (origin if allowed else None)


async def test_origins_come_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSESERVE_CORS_ORIGINS", "https://a.example, https://b.example")
    assert Settings().cors_origins == ("https://a.example", "https://b.example")
    monkeypatch.delenv("SPARSESERVE_CORS_ORIGINS")
    assert Settings().cors_origins == ()


async def test_every_answer_has_an_id() -> None:
    engine = FakeEngine(GUARDED)
    async with http_client(engine) as client:
        key = {"X-API-Key": "right"}
        for response in (
            await client.get("/health"),
            await client.get("/methods"),
            await client.get("/nothing", headers=key),
            await client.get("/generate", headers=key),
            await client.post("/generate", content=b"{", headers=key),
        ):
            assert re.fullmatch("[0-9a-f]{32}", response.headers["x-request-id"])


@pytest.mark.parametrize(
    "path", ["/generate", "/v1/completions", "/v1/chat/completions", "/health"]
)
async def test_no_request_waits_for_a_thread(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """FastAPI hands every dependency that is no coroutine to one: 40 % of what a refusal cost."""

    async def refuse(*_: object) -> None:
        pytest.fail("a plain function was sent to a thread")

    monkeypatch.setattr("fastapi.dependencies.utils.run_in_threadpool", refuse)
    monkeypatch.setattr("fastapi.routing.run_in_threadpool", refuse)
    messages = [{"role": "user", "content": "p"}]
    body = {"messages": messages} if "chat" in path else {"prompt": "p"}
    async with http_client(FakeEngine()) as client:
        asked = client.get(path) if path == "/health" else client.post(path, json=body)
        assert (await asked).status_code == 200
