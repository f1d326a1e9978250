"""Settings come from the environment, are checked, and never show a key."""

import pytest
from pydantic import ValidationError

from service.settings import Settings


def test_keys_are_separated_by_commas_in_the_environment(monkeypatch):
    monkeypatch.setenv("SPARSESERVE_API_KEYS", "key-of-alice, key-of-bob,")
    keys = [key.get_secret_value() for key in Settings().api_keys]
    assert keys == ["key-of-alice", "key-of-bob"]
    assert "alice" not in repr(Settings())


def test_an_environment_without_keys_lets_everybody_in(monkeypatch):
    monkeypatch.delenv("SPARSESERVE_API_KEYS", raising=False)
    assert Settings().api_keys == ()


def test_an_error_names_the_setting_but_not_its_value(monkeypatch):
    monkeypatch.setenv("SPARSESERVE_MAX_STEP_TOKENS", "secret")
    with pytest.raises(ValidationError, match="max_step_tokens") as caught:
        Settings()
    assert "secret" not in str(caught.value)


def test_settings_are_frozen_and_every_one_is_described():
    with pytest.raises(ValidationError):
        Settings().port = 1  # type: ignore[misc]  # frozen is what is tested
    assert all(field.description for field in Settings.model_fields.values())
    assert len(Settings.model_fields) <= 40


def test_a_step_that_could_starve_new_prompts_is_refused():
    with pytest.raises(ValidationError, match="max_step_tokens is 256"):
        Settings(max_step_tokens=256, max_running_requests=200)
