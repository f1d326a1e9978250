"""Methods that exist to be compared with: listed, and refused unless the operator allows them."""

from collections.abc import Iterator

import httpx
import pytest

from service.api import methods as methods_route
from service.settings import Settings
from sparse_methods import registry
from sparse_methods.methods.streaming_v1 import Streaming
from tests.service.fake_engine import FakeEngine, http_client

pytestmark = pytest.mark.anyio


@pytest.fixture
def expensive() -> Iterator[str]:
    """The name of a method that is there for this test only."""

    @registry.register_sparse_method("expensive")
    class Expensive(Streaming):
        """Costs a fortune."""

        evaluation_only = True

    yield Expensive.registered_name
    registry._registry.pop("expensive")
    methods_route._method_version.cache_clear()


async def ask(engine: FakeEngine, method: str, *, in_query: bool = False) -> httpx.Response:
    body = {"prompt": "p"} if in_query else {"prompt": "p", "method": method}
    async with http_client(engine) as client:
        return await client.post(
            f"/generate?method={method}" if in_query else "/generate", json=body
        )


@pytest.mark.parametrize("in_query", [False, True])
async def test_it_is_refused_wherever_it_is_named(expensive: str, in_query: bool) -> None:
    engine = FakeEngine()
    response = await ask(engine, expensive, in_query=in_query)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "method"
    assert "'expensive'" in error["message"]
    assert "allow_evaluation_methods" in error["message"]
    assert not engine.requests


async def test_it_is_refused_as_the_default_too(expensive: str) -> None:
    engine = FakeEngine()
    engine.default_method = (expensive, "v1")
    async with http_client(engine) as client:
        response = await client.post("/generate", json={"prompt": "p"})
    assert response.status_code == 400


async def test_it_runs_if_the_operator_allows_it(expensive: str) -> None:
    engine = FakeEngine(Settings(allow_evaluation_methods=True))
    response = await ask(engine, expensive)
    assert response.status_code == 200
    assert response.headers["x-sparse-method"] == expensive
    assert len(engine.requests) == 1


async def test_the_listing_tells_it_from_the_others(expensive: str) -> None:
    async with http_client(FakeEngine()) as client:
        pages = (await client.get("/methods")).json()["methods"]
    flags = {page["name"]: page["versions"][0]["evaluation_only"] for page in pages}
    assert flags[expensive]
    assert not flags["dense"]
