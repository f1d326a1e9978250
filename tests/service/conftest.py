"""A tiny random model with the built-in tokenizer, saved once."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

pytest.register_assert_rewrite(  # what tests share tells of a failure as they do
    "tests.service.engine.faults.injection", "tests.service.engine.stepping"
)
TOKENIZER_DIR = Path(__file__).parent.parent.parent / "service" / "default_model"


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory):
    """Two layers, weights drawn wide enough that attention is far from uniform."""
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                fan_in = 1 if "embed" in name else parameter.shape[1]
                wide = 3.0 if "q_proj" in name else 1.3
                parameter.normal_(0, wide / fan_in**0.5)
    directory = tmp_path_factory.mktemp("tiny_model")
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER_DIR / name, directory / name)
    return directory
