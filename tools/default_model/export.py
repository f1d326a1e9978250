"""The trained model as files that plain transformers loads: Qwen3, safetensors, tokenizer."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from tools.default_model.model import LanguageModel
from tools.default_model.recipe import BOS_ID, EOS_ID, PAD_ID, Shape

NUM_SHARDS = 2
BESIDE_WEIGHTS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


def config_of(shape: Shape) -> dict[str, object]:
    """Return the config.json of a shape."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.max_context,
        "rope_theta": shape.rope_theta,
        "rms_norm_eps": shape.norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
        "torch_dtype": "bfloat16",
    }


def with_bos(tokenizer: Tokenizer) -> Tokenizer:
    """Return a copy that puts `<|bos|>` first unless asked for no special tokens."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    bos = copy.id_to_token(BOS_ID)
    copy.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, BOS_ID)]
    )
    return copy


def export(model: LanguageModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the model in bfloat16, two shards of near-equal size, with its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        f"model.{name}": weight.detach().to("cpu", torch.bfloat16).contiguous()
        for name, weight in model.state_dict().items()
    }
    _write_shards(weights, folder)
    ids = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.id_to_token(BOS_ID),
        "eos_token": tokenizer.id_to_token(EOS_ID),
        "pad_token": tokenizer.id_to_token(PAD_ID),
        "model_max_length": model.shape.max_context,
        "clean_up_tokenization_spaces": False,
    }
    _write_json(folder / "config.json", config_of(model.shape))
    _write_json(folder / "generation_config.json", ids)
    _write_json(folder / "tokenizer_config.json", tokenizer_config)
    with_bos(tokenizer).save(str(folder / "tokenizer.json"), pretty=False)  # 156 kB less


def exported_weights(folder: Path) -> dict[str, Tensor]:
    """Read an export's weights back, under the names of the training model."""
    weights: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("model-*.safetensors")):
        weights |= {name.removeprefix("model."): w.float() for name, w in load_file(shard).items()}
    return weights


def blend(base: Path, tuned: Path, share: float, folder: Path) -> None:
    """Write the weighted mean of an export and of one that was fine-tuned from it.

    The mean keeps most of what fine-tuning taught and loses less of what it cost.
    Source: Wortsman et al., Robust fine-tuning of zero-shot models, arXiv:2109.01903.

    Args:
        base: Folder of the export that fine-tuning started from.
        tuned: Folder of the fine-tuned one, whose configuration and tokenizer are taken.
        share: Weight of the fine-tuned one, 0 to 1.
        folder: Where to write.

    Raises:
        ValueError: the share is no share, or the exports have not the same weights.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"The share of the fine-tuned weights is between 0 and 1, not {share}.")
    first, second = exported_weights(base), exported_weights(tuned)
    if {n: w.shape for n, w in first.items()} != {n: w.shape for n, w in second.items()}:
        raise ValueError(f"{base} and {tuned} are not exports of one shape: nothing to blend.")
    folder.mkdir(parents=True, exist_ok=True)
    for name in BESIDE_WEIGHTS:
        shutil.copyfile(tuned / name, folder / name)
    means = {f"model.{n}": w.lerp(second[n], share).to(torch.bfloat16) for n, w in first.items()}
    _write_shards(means, folder)


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


def _write_shards(weights: dict[str, Tensor], folder: Path) -> None:
    total = sum(weight.nbytes for weight in weights.values())
    shards: list[dict[str, Tensor]] = [{} for _ in range(NUM_SHARDS)]
    written = 0
    for name in sorted(weights):
        shards[written * NUM_SHARDS // total][name] = weights[name]
        written += weights[name].nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{NUM_SHARDS:05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)
