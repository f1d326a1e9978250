import copy

import pytest
import torch

from service.errors import ModelNotSupportedError
from service.models.rope import pin_rope, rope_types
from tests.service.models import tiny

ORIGINAL, EXTENDED = 32, 128
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.05 * i for i in range(8)],
    "long_factor": [2.0 + 0.5 * i for i in range(8)],
    "original_max_position_embeddings": ORIGINAL,
}


def longrope_model():
    return tiny.build(
        "phi3",
        rope_parameters=copy.deepcopy(LONGROPE),
        max_position_embeddings=EXTENDED,
        original_max_position_embeddings=ORIGINAL,
    )


def dynamic_model():
    parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    return tiny.build("llama", rope_parameters=parameters, max_position_embeddings=64)


def error(actual, expected):
    return float((actual - expected).abs().max() / expected.abs().max())


def test_the_fixture_has_two_sets_of_frequencies_that_differ():
    model, ids = longrope_model(), tiny.tokens(ORIGINAL, 1)
    short = tiny.plain_logits(model, ids)
    long = tiny.plain_logits(model, ids + tiny.tokens(8, 2))[:ORIGINAL]
    assert error(long, short) > 0.1  # what a packed batch would suffer from a long neighbour


def test_a_prompt_beyond_the_original_context_equals_transformers():
    ids = tiny.tokens(ORIGINAL + 21, 3)
    expected = tiny.plain_logits(longrope_model(), ids)
    model = longrope_model()
    notes = pin_rope(model, EXTENDED)
    assert error(tiny.plain_logits(model, ids), expected) < 1e-6
    assert notes == (
        "Every request uses the long factors of longrope, because the served context of"
        " 128 tokens is longer than 32.",
    )


def test_a_context_within_the_original_equals_transformers():
    ids = tiny.tokens(ORIGINAL, 4)
    expected = tiny.plain_logits(longrope_model(), ids)
    model = longrope_model()
    assert "short factors" in pin_rope(model, ORIGINAL)[0]
    assert error(tiny.plain_logits(model, ids), expected) < 1e-6


def test_a_short_prompt_under_a_long_context_departs_from_transformers_as_documented():
    ids = tiny.tokens(20, 5)
    expected = tiny.plain_logits(longrope_model(), ids)
    model = longrope_model()
    pin_rope(model, EXTENDED)
    assert error(tiny.plain_logits(model, ids), expected) > 1e-2


@pytest.mark.parametrize("max_context", [ORIGINAL, EXTENDED])
def test_a_pinned_token_does_not_see_how_long_the_others_are(max_context):
    model = longrope_model()
    pin_rope(model, max_context)
    rotary, x = model.model.rotary_emb, torch.zeros(1)
    alone = rotary(x, torch.arange(5)[None])
    packed = rotary(x, torch.cat([torch.arange(5), torch.tensor([EXTENDED - 1])])[None])
    again = rotary(x, torch.arange(5)[None])
    for a, b, c in zip(alone, packed, again, strict=True):
        assert torch.equal(a, b[:, :5])
        assert torch.equal(a, c)


def test_longrope_of_one_layer_type_leaves_the_other_alone():
    parameters = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": copy.deepcopy(LONGROPE),
    }
    model = tiny.build("gemma3", rope_parameters=parameters, max_position_embeddings=EXTENDED)
    assert rope_types(model.config) == {"default", "longrope"}
    untouched = model.model.rotary_emb.sliding_attention_inv_freq.clone()
    before = model.model.rotary_emb.full_attention_inv_freq.clone()
    assert len(pin_rope(model, EXTENDED)) == 1
    assert torch.equal(model.model.rotary_emb.sliding_attention_inv_freq, untouched)
    assert not torch.equal(model.model.rotary_emb.full_attention_inv_freq, before)


def test_dynamic_rope_is_served_up_to_the_length_at_which_it_would_stretch():
    ids = tiny.tokens(60, 6)
    expected = tiny.plain_logits(dynamic_model(), ids)
    model = dynamic_model()
    assert "up to 64 tokens" in pin_rope(model, 64)[0]
    assert error(tiny.plain_logits(model, ids), expected) < 1e-6


def test_dynamic_rope_beyond_that_length_is_refused():
    with pytest.raises(ModelNotSupportedError, match="serve at most 64 tokens"):
        pin_rope(dynamic_model(), 65)


def test_an_embedding_that_still_depends_on_the_batch_is_refused():
    model = longrope_model()
    rotary = model.model.rotary_emb
    original = rotary.forward
    rotary.forward = lambda x, positions: original(x, positions * int(positions.max()))
    with pytest.raises(ModelNotSupportedError, match="would change each other"):
        pin_rope(model, EXTENDED)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox"])
def test_static_embeddings_are_left_alone(name):
    model, ids = tiny.build(name), tiny.tokens(30, 7)
    expected = tiny.plain_logits(model, ids)
    assert pin_rope(model, 256) == ()
    assert torch.equal(tiny.plain_logits(model, ids), expected)
