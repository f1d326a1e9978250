"""Tiny random models of the architectures the service promises, with weights that matter.

At Hugging Face's own initialisation every key looks alike, and any mask passes a test.
"""

import copy
import math
from collections.abc import Callable

import torch
import transformers
from transformers import PreTrainedModel

VOCAB_SIZE = 97
WINDOW = 7
NUM_LAYERS = 4

_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ALTERNATING = ["sliding_attention", "full_attention"] * (NUM_LAYERS // 2)
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
_EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}

_RECIPES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
    "gemma2": (
        "Gemma2",
        {"head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 16},
    ),
    "gemma3": (
        "Gemma3",
        {
            "head_dim": 16,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 16,
            "layer_types": _ALTERNATING,
        },
    ),
    "phi3": ("Phi3", {}),
    "olmo2": ("Olmo2", {}),
    "gpt_neox": ("GPTNeoX", {}),
    "mixtral": ("Mixtral", {**_EXPERTS}),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "decoder_sparse_step": 1,
        },
    ),
    "gpt_oss": (
        "GptOss",
        {
            "head_dim": 16,
            "sliding_window": WINDOW,
            "layer_types": _ALTERNATING,
            "rope_parameters": _YARN,
            **_EXPERTS,
        },
    ),
}
ARCHITECTURES = tuple(_RECIPES)


def build(name: str, **overrides: object) -> PreTrainedModel:
    """Build the tiny model called ``name`` in float32, the same at every call."""
    prefix, special = _RECIPES[name]
    config_name = f"{prefix}TextConfig" if name == "gemma3" else f"{prefix}Config"
    config_class: Callable[..., transformers.PreTrainedConfig] = getattr(transformers, config_name)
    config = config_class(**copy.deepcopy({**_COMMON, **special, **overrides}))
    model_class = getattr(transformers, f"{prefix}ForCausalLM")
    with torch.random.fork_rng():  # biases keep part of their initial, random value
        torch.manual_seed(0)
        model: PreTrainedModel = model_class(config).eval().float()
    model.requires_grad_(requires_grad=False)
    model.set_attn_implementation("eager")
    redraw(model)
    return model


def redraw(model: torch.nn.Module) -> None:
    """Draw matrices large enough to attend sharply, and move everything else off its default."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            parameter.data.copy_(noise * 1.3 / math.sqrt(min(parameter.shape[-2:])))
        else:
            parameter.data.add_(0.2 * noise)


def tokens(length: int, seed: int) -> list[int]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()
    return ids


@torch.inference_mode()
def plain_logits(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """[len, V] logits of the model alone."""
    logits: torch.Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return logits
