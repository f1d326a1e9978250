"""What may come next: masks of grammars over the built-in vocabulary."""

import asyncio
import json
import sys

import pytest
import tokenizers
import torch

from service.engine.grammar import Grammar, GrammarCompiler
from service.engine.sampled import no_token_error
from service.engine.sampler import Sampler
from service.engine.sequence import SamplingParams
from service.engine.tokenizer import Tokenizer
from service.errors import BadRequestError
from tests.service.conftest import TOKENIZER_DIR
from tests.service.engine.test_sampler import sequence

TOKENIZER = Tokenizer.load(TOKENIZER_DIR)
COMPILER = GrammarCompiler(TOKENIZER)
EOS = 1
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}


def compiled(kind, source, compiler=COMPILER):
    text = source if isinstance(source, str) else json.dumps(source)
    matcher = asyncio.run(compiler.matcher(Grammar(kind, text, "response_format")))
    return matcher.fork()


def ids_of(text):
    return TOKENIZER.encode(text, adds_special_tokens=False)


def takes(kind, source, text):
    """Whether the grammar leads through the text and lets it end there."""
    matcher, tokens = compiled(kind, source), ids_of(text)
    steps = enumerate([*tokens, EOS])
    return all(matcher.allowed(tokens[:place])[token] for place, token in steps)


@pytest.mark.parametrize(
    ("kind", "source", "text", "is_within"),
    [
        ("regex", "[0-9]{3}x?", "123x", True),
        ("regex", "[0-9]{3}x?", "12", False),
        ("regex", "[é🚀]+", "é🚀", True),
        ("choice", ["yes", 'a "no"\\'], "yes", True),
        ("choice", ["yes", 'a "no"\\'], 'a "no"\\', True),
        ("choice", ["yes", "no"], "yesno", False),
        ("lark", 'start: "a" start "b" | "."', "aa.bb", True),
        ("lark", 'start: "a" start "b" | "."', "aa.b", False),
        ("json_schema", PERSON, '{"name":"Ann","age":7,"kind":"cat"}', True),
        ("json_schema", PERSON, '{\n  "name": "Ann",\n  "age": 7,\n  "kind": "cat"\n}', True),
        ("json_schema", PERSON, '{"name":"Ann","age":121,"kind":"cat"}', False),
        ("json_schema", PERSON, '{"name":"Annabelle","age":1,"kind":"cat"}', False),
        ("json_schema", PERSON, '{"name":"Ann","age":1}', False),
        ("json_schema", PERSON, '{  "name":"Ann","age":7,"kind":"cat"}', False),
        ("json_schema", {"type": "object"}, '{"any": [1, {"thing": null}]}', True),
    ],
)
def test_a_grammar_leads_through_its_texts_and_no_others(kind, source, text, is_within):
    assert takes(kind, source, text) == is_within


def test_a_mask_covers_the_vocabulary_and_no_special_token_but_the_end():
    matcher = compiled("regex", "(.|\n)*")
    mask = matcher.allowed([])
    assert mask.shape == (TOKENIZER.vocab_size,)
    assert mask[EOS]
    assert not mask[0]
    assert not mask[2]


def test_forks_go_their_own_ways():
    first = compiled("regex", "ab|cd")
    other = first.fork()
    assert first.allowed(ids_of("a"))[ids_of("b")[0]]
    assert other.allowed(ids_of("c"))[ids_of("d")[0]]


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("regex", "(["),
        ("regex", r"[^\x00-\U0010FFFF]"),
        ("lark", "start: foo"),
        ("lark", "not a grammar"),
        ("json_schema", "{"),
        ("json_schema", "false"),
        ("json_schema", {"enum": []}),
        ("json_schema", {"type": "string", "minLength": 5, "maxLength": 2}),
        ("json_schema", {"type": "nope"}),
        ("json_schema", {"$ref": "http://example.com/schema"}),
        ("json_schema", {"not": {"type": "string"}}),
    ],
)
def test_what_is_invalid_or_impossible_is_a_bad_request(kind, source):
    with pytest.raises(BadRequestError, match="is not usable") as caught:
        compiled(kind, source)
    assert caught.value.param == "response_format"
    assert "\n" not in str(caught.value)


def test_a_model_without_an_end_cannot_be_held_to_a_grammar():
    backend = tokenizers.Tokenizer.from_file(str(TOKENIZER_DIR / "tokenizer.json"))
    endless = GrammarCompiler(Tokenizer(backend))
    with pytest.raises(BadRequestError, match="no token for the end"):
        compiled("regex", "a", endless)


def test_a_server_without_the_library_refuses_formats_and_nothing_else(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    assert asyncio.run(GrammarCompiler(TOKENIZER).matcher(None)) is None
    with pytest.raises(BadRequestError, match="without llguidance"):
        compiled("regex", "a", GrammarCompiler(TOKENIZER))


def test_the_sampler_chooses_within_the_grammar_and_ends_where_it_ends():
    sampler = Sampler(torch.device("cpu"), TOKENIZER.vocab_size, frozenset({EOS}))
    held = sequence(SamplingParams(), 3)
    held.matcher = compiled("json_schema", PERSON)
    free = sequence(SamplingParams(), 3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        logits = torch.randn(2, TOKENIZER.vocab_size, generator=generator)
        token, other = sampler.sample(logits, [held, free]).result().token_ids
        if token == EOS:
            break
        held.output_ids.append(token)
        free.output_ids.append(other)
    person = json.loads(TOKENIZER.decode(held.output_ids))
    assert set(person) == {"name", "age", "kind"}
    assert len(person["name"]) <= 6
    assert 0 <= person["age"] <= 120


def test_a_sequence_that_left_its_grammar_fails_and_says_why():
    sampler = Sampler(torch.device("cpu"), TOKENIZER.vocab_size, frozenset({EOS}))
    lost = sequence(SamplingParams(temperature=0), output_ids=ids_of("z"))
    lost.matcher = compiled("regex", "[0-9]+")
    result = sampler.sample(torch.zeros(1, TOKENIZER.vocab_size), [lost]).result()
    assert result.failed == [0]
    assert "grammar" in str(no_token_error(lost))
    assert "not a number" in str(no_token_error(sequence(SamplingParams())))
