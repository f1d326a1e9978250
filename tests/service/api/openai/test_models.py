"""GET /v1/models."""

import pytest

from tests.service.fake_engine import FakeEngine, http_client

pytestmark = pytest.mark.anyio


async def test_the_one_model_is_listed_and_shown() -> None:
    async with http_client(FakeEngine()) as client:
        listing = (await client.get("/v1/models")).json()
        assert listing["object"] == "list"
        (card,) = listing["data"]
        assert (card["id"], card["object"], card["max_model_len"]) == ("fake", "model", 1000)
        assert card["created"] > 1_700_000_000
        assert (await client.get("/v1/models/fake")).json() == card
        missing = await client.get("/v1/models/other")
        assert missing.status_code == 404
        assert missing.json()["error"]["param"] == "model"


async def test_a_name_with_slashes_is_a_model_s_name_too() -> None:
    engine = FakeEngine()
    engine.model_name = "org/fake"
    async with http_client(engine) as client:
        for path in ("/v1/models/org/fake", "/v1/models/org%2Ffake"):
            assert (await client.get(path)).json()["id"] == "org/fake"
        missing = await client.get("/v1/models/org/other")
        assert (missing.status_code, missing.json()["error"]["param"]) == (404, "model")
