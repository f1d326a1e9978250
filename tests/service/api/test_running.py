"""POST /requests/{id}/cancel."""

import asyncio

import httpx
import pytest

from service.api.running import RunningRequests
from tests.service.fake_engine import FakeEngine, http_client, wait_until

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
async def test_a_cancelled_request_is_answered_with_what_it_has(path: str) -> None:
    engine = FakeEngine()
    engine.step_s, engine.words = 0.02, ("word ",) * 500
    async with http_client(engine) as client:
        asking = asyncio.create_task(
            client.post(path, json={"prompt": "p"}, headers={"X-Request-Id": "mine"})
        )
        await asyncio.to_thread(wait_until, lambda: engine.num_running == 1)
        cancelled = await client.post("/requests/mine/cancel")
        assert cancelled.json() == {"id": "mine", "cancelled": True}
        answer = (await asking).json()
        assert answer["choices"][0]["finish_reason"] == "abort"
        assert (await client.post("/requests/mine/cancel")).status_code == 404


async def test_the_id_of_an_answer_names_it_too(anyio_backend: str) -> None:
    engine = FakeEngine()
    engine.step_s, engine.words = 0.02, ("word ",) * 500
    async with http_client(engine) as client:
        body = {"prompt": ["a", "b"], "stream": True}
        asking = asyncio.create_task(client.post("/v1/completions", json=body))
        await asyncio.to_thread(wait_until, lambda: engine.num_running == 2)
        response = await client.post(f"/requests/{engine.requests[0].request_id}/cancel")
        assert response.status_code == 200
        text = (await asking).text
    assert text.count('"finish_reason":"abort"') == 2
    assert text.endswith("data: [DONE]\n\n")


async def test_an_unknown_id_is_a_404() -> None:
    async with http_client(FakeEngine()) as client:
        response: httpx.Response = await client.post("/requests/nobody/cancel")
        assert response.status_code == 404
        assert response.json()["error"]["param"] == "request_id"


async def test_nothing_is_kept_of_what_has_ended() -> None:
    registry, generation = RunningRequests(), FakeEngine()
    with registry.registered(["a", "a", "b"], generation):  # type: ignore[arg-type]
        with registry.registered(["a"], generation):  # type: ignore[arg-type]
            pass
        assert set(registry._generations) == {"a", "b"}
    assert not registry._generations
