"""A tokenizer that cannot encode or decode fails the request only."""

import pytest

from service.engine.events import FaultKind
from service.errors import TokenizerError
from tests.service.engine.driving import prompt_of, request, run
from tests.service.engine.faults.injection import Panic, same, together


@pytest.mark.parametrize("error", [ValueError("the prompt"), Panic("the prompt")])
def test_a_tokenizer_that_cannot_encode_fails_the_request_only(engine, monkeypatch, error):
    class Broken:
        def encode(self, _text):
            raise error

    with monkeypatch.context() as broken:
        broken.setattr(engine.tokenizer, "_backend", Broken())
        one = request(None)
        object.__setattr__(one, "prompt", "some text")
        with pytest.raises(TokenizerError) as told:
            run(engine, one)
    assert "the prompt" not in str(told.value)
    assert engine.events.kinds == [FaultKind.TOKENIZER]
    assert len(run(engine, request(prompt_of(20)))[0][0][0]) == 8


@pytest.mark.parametrize("error", [ValueError("a token"), Panic("a token")])
def test_a_tokenizer_that_cannot_decode_fails_the_request_only(engine, monkeypatch, error):
    other = request(prompt_of(30, seed=1))
    [expected] = run(engine, other)
    [(tokens, _, _)] = run(engine, request(prompt_of(20)))
    bad = next(t for t in tokens[0] if t not in expected[0][0])
    original = engine.tokenizer._find_bytes

    def find_bytes(token_id):
        if token_id == bad:
            raise error
        return original(token_id)

    monkeypatch.setattr(engine.tokenizer, "_find_bytes", find_bytes)
    engine.tokenizer._bytes.clear()
    failed, fine = together(engine, request(prompt_of(20)), other)
    assert isinstance(failed, TokenizerError)
    same(fine, expected)
    assert engine.events.kinds == [FaultKind.TOKENIZER]
