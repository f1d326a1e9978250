import copy

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from service.errors import ModelNotSupportedError
from service.models.discovery import attach, discover, discover_on_meta
from service.models.probing import MaskKind, classify
from tests.service.models import tiny

FULL, SLIDING = 0, tiny.WINDOW
WINDOWS = {
    "mistral": [SLIDING] * 4,
    "gemma2": [SLIDING, FULL] * 2,
    "gemma3": [SLIDING, FULL] * 2,
    "gpt_oss": [SLIDING, FULL] * 2,
}


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_every_layer_is_found_with_its_shape_and_window(name):
    layers = discover(tiny.build(name))
    assert [layer.index for layer in layers] == [0, 1, 2, 3]
    assert [layer.geometry.window for layer in layers] == WINDOWS.get(name, [FULL] * 4)
    num_kv_heads = 4 if name == "gpt_neox" else 2
    for layer in layers:
        geometry = layer.geometry
        assert (geometry.num_heads, geometry.num_kv_heads) == (4, num_kv_heads)
        assert (geometry.head_dim, geometry.value_dim) == (16, 16)
        assert geometry.scale == pytest.approx(0.25)
        assert geometry.softcap == (50.0 if name == "gemma2" else 0.0)
        assert geometry.has_sinks == (name == "gpt_oss")
        assert geometry.chunk == 0
        assert layer.notes == ()


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_meta_finds_what_the_loaded_model_shows(name):
    model = tiny.build(name)
    on_meta = discover_on_meta(model.config)
    assert on_meta is not None
    loaded = discover(model)
    assert attach(on_meta, model) == loaded
    assert [model.get_submodule(layer.module_name) for layer in loaded] == [
        layer.module for layer in loaded
    ]


def test_the_model_is_left_as_it_was():
    model = tiny.build("gemma2")
    before = copy.deepcopy(model.config.to_dict())
    discover(model)
    discover_on_meta(model.config)
    assert model.config._attn_implementation == "eager"
    assert model.config.to_dict() == before
    assert not any(hasattr(module, "sparseserve_recorder") for module in model.modules())


def test_a_chunked_mask_is_found_although_no_argument_names_it():
    config = transformers.Llama4TextConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, intermediate_size_mlp=96,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        num_local_experts=2, attention_chunk_size=6,
        layer_types=["chunked_attention", "full_attention"], pad_token_id=0,
    )  # fmt: skip
    layers = discover(AutoModelForCausalLM.from_config(config).eval())
    assert [layer.geometry.chunk for layer in layers] == [6, 0]
    assert [layer.geometry.window for layer in layers] == [0, 0]


def test_a_window_the_arguments_do_not_mention_is_taken_from_the_mask():
    config = transformers.PhimoeConfig(
        vocab_size=97, hidden_size=64, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=2, sliding_window=9,
        pad_token_id=0,
    )  # fmt: skip
    layers = discover(AutoModelForCausalLM.from_config(config).eval())
    assert [layer.geometry.window for layer in layers] == [9, 9]
    assert "window of 9" in layers[0].notes[0]


class MaskReadingLlama(transformers.LlamaForCausalLM):
    """Computes with the mask, as some models do."""

    def forward(self, *args, **kwargs):
        layer = self.model.layers[0].self_attn
        original = layer.forward

        def forward(*inner, **inner_kwargs):
            mask = inner_kwargs.get("attention_mask")
            if mask is not None:
                mask[..., :1]
            return original(*inner, **inner_kwargs)

        layer.forward = forward
        try:
            return super().forward(*args, **kwargs)
        finally:
            layer.forward = original


def test_a_model_that_computes_with_its_mask_is_believed_on_its_arguments():
    config = transformers.LlamaConfig(**tiny.build("llama").config.to_dict())
    layers = discover(MaskReadingLlama(config).eval())
    assert len(layers) == 4
    assert "could not be probed" in layers[0].notes[0]


def patched(change, **overrides):
    """A tiny Llama whose first attention module calls ``change`` around its forward pass."""
    model = tiny.build("llama", **overrides)
    module = model.model.layers[0].self_attn
    original = module.forward
    module.forward = lambda *args, **kwargs: change(original, *args, **kwargs)
    return model


def twice(forward, *args, **kwargs):
    forward(*args, **kwargs)
    return forward(*args, **kwargs)


def with_bias(forward, *args, **kwargs):
    return forward(*args, **kwargs, position_bias=torch.zeros(1))


def with_unknown_tensor(forward, *args, **kwargs):
    return forward(*args, **kwargs, gate_of_next_year=torch.zeros(1))


def without_attention(forward, hidden_states, **kwargs):
    return hidden_states, None


def not_causal(forward, *args, **kwargs):
    return forward(*args, **kwargs, is_causal=False)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (twice, "several times per forward pass"),
        (with_bias, "passes position_bias"),
        (with_unknown_tensor, "passes gate_of_next_year"),
        (without_attention, "Only 3 of the 4 layers"),
        (not_causal, "layer 0 of LlamaForCausalLM is not causal"),
    ],
)
def test_what_a_paged_cache_cannot_serve_is_refused_by_name(change, sentence):
    with pytest.raises(ModelNotSupportedError, match=sentence):
        discover(patched(change))


REFUSED = {
    "mamba": (
        lambda: transformers.MambaConfig(
            vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4
        ),
        "recurrent state|layers of type",
    ),
    "qwen3_next": (
        lambda: transformers.Qwen3NextConfig(
            vocab_size=97, hidden_size=64, intermediate_size=32, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=2,
            num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16,
            linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8,
            linear_value_head_dim=8,
        ),
        "layers of type linear_attention",
    ),
    "bloom": (
        lambda: transformers.BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4),
        "does not use the attention interface",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_architectures_beyond_the_engine_are_refused_before_weights_are_read(name):
    make, sentence = REFUSED[name]
    config = make()
    with pytest.raises(ModelNotSupportedError, match=sentence):
        discover_on_meta(config)


def test_code_that_fails_in_the_dry_run_is_a_refusal_not_a_crash():
    def broken(forward, *args, **kwargs):
        raise LookupError("no such thing")

    with pytest.raises(ModelNotSupportedError, match=r"fails without its own mask.*no such thing"):
        discover(patched(broken))


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (lambda b, h, q, k: k <= q, MaskKind("full")),
        (lambda b, h, q, k: (k <= q) & (k > q - 512), MaskKind("window", 512)),
        (lambda b, h, q, k: (k <= q) & (k // 8192 == q // 8192), MaskKind("chunk", 8192)),
        (lambda b, h, q, k: torch.ones_like(k, dtype=torch.bool), MaskKind("other")),
        (lambda b, h, q, k: (k <= q) & (k % 2 == 0), MaskKind("other")),
        (lambda b, h, q, k: (k <= q) & ((k > q - 4) | (k < 2)), MaskKind("other")),
    ],
)
def test_masks_are_told_apart_by_what_they_do(function, kind):
    assert classify(function, torch.device("cpu")) == kind
