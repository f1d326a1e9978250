"""How OpenAI's own client takes what goes wrong: by the class of error its users catch."""

import openai
import pytest
from pydantic import SecretStr

from service.errors import GenerationError, QueueFullError
from service.settings import Settings
from tests.service.fake_engine import WORDS, FakeEngine, running_server


@pytest.fixture
def engine():
    return FakeEngine()


def client_of(address, key="none", **options):
    return openai.OpenAI(base_url=address + "/v1", api_key=key, **{"max_retries": 0, **options})


def test_a_failure_in_mid_stream_is_an_api_error(engine):
    engine.fail_at, engine.failure = 2, GenerationError("The engine failed.")
    with running_server(engine) as address, client_of(address) as client:
        chunks = client.completions.create(model="fake", prompt="p", stream=True)
        assert (next(chunks).choices[0].text, next(chunks).choices[0].text) == WORDS[:2]
        with pytest.raises(openai.APIError, match="The engine failed"):
            next(chunks)


def test_a_failure_without_a_stream_is_not_tried_again(engine):
    engine.fail_at, engine.failure = 2, GenerationError("The engine failed.")
    with running_server(engine) as address, client_of(address, max_retries=2) as client:
        with pytest.raises(openai.InternalServerError):
            client.completions.create(model="fake", prompt="p")
        assert len(engine.requests) == 1


def test_a_full_queue_is_a_rate_limit_and_tried_again_when_told(engine, monkeypatch):
    engine.refusal = QueueFullError("Full.")
    waits: list[float] = []
    with running_server(engine) as address, client_of(address, max_retries=1) as client:
        monkeypatch.setattr("time.sleep", waits.append)
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(
                model="fake", messages=[{"role": "user", "content": "x"}]
            )
        monkeypatch.undo()
    assert 1.0 in waits


def test_a_wrong_key_is_an_authentication_error(engine):
    guarded = Settings().model_copy(update={"api_keys": (SecretStr("right"),)})
    with running_server(engine, guarded) as address:
        with client_of(address, "wrong") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        with client_of(address, "right") as client:
            assert client.models.list().data[0].id == "fake"
