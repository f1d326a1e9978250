"""From a directory to a model that is ready to be served: checked, loaded, discovered, pinned."""

import importlib.resources
import importlib.util
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from service.errors import ModelNotSupportedError
from service.models.bridge import NAME
from service.models.discovery import DiscoveredLayer, attach, discover, discover_on_meta
from service.models.fusions import Fusions
from service.models.hugging_face import Progress, quiet, reported_progress, set_attention
from service.models.rope import pin_rope, rope_parameters, rope_types
from service.models.surgery import fuse_modules

BUILT_IN_NAME = "sparseserve-default"
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
_CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
_LOAD_FAILURES = (
    OSError,
    ValueError,
    TypeError,
    RuntimeError,
    LookupError,
    ImportError,
    SafetensorError,
    StrictDataclassError,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reference:
    """What a model said before it was divided among ranks: logits [len, V] of some prompts."""

    prompts: tuple[list[int], ...]
    logits: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class LoadedModel:
    """A model whose attention layers call the seam; they must be bound before it runs.

    Attributes:
        directory: Where weights, config and tokenizer came from.
        name: What clients call it.
        layers: Its attention layers in execution order.
        eos_token_ids: Tokens that end a text; may be empty.
        max_context_tokens: Longest prompt plus output that may be served.
        fusions: Its modules that compute with fewer kernels than their own code would.
        notes: What an operator may want to know, one sentence each.
        reference: What the self-test compares with; None lets it run the model itself.
    """

    model: PreTrainedModel
    layers: list[DiscoveredLayer]
    directory: Path
    name: str
    eos_token_ids: tuple[int, ...]
    max_context_tokens: int
    fusions: Fusions = field(default_factory=Fusions)
    notes: tuple[str, ...] = ()
    reference: Reference | None = None


def default_model_directory() -> Path:
    """Directory of the model that ships with the package."""
    return Path(str(importlib.resources.files("service") / "default_model"))


def load_model(  # noqa: PLR0913 - each is a setting of the server
    path: Path | None,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress | None = None,
    max_context_tokens: int | None = None,
    *,
    fuse: bool = True,
    max_step_tokens: int | None = None,
) -> LoadedModel:
    """Load a causal LM from a directory.

    Args:
        path: A Hugging Face model directory; None takes the built-in model.
        device: auto, cpu or cuda; auto takes a GPU if there is one.
        dtype: auto, float32, bfloat16 or float16; auto is float32 on a CPU, bfloat16 on a GPU.
        progress: Called with (stage, done, total).
        max_context_tokens: Longest context that will be served; None takes the model's own limit.
        fuse: Whether modules are fused where that gives the same numbers.
        max_step_tokens: Most tokens of a step; None may be any number.

    Raises:
        ModelNotSupportedError: The model cannot be served; the message says why.
    """
    directory = path or default_model_directory()
    check_directory(directory)
    place = _resolve_device(device)
    config = read_config(directory)
    limit = resolve_context(config, max_context_tokens)
    layers = discover_on_meta(config)  # refuses what cannot be served before it reads the weights
    model = _load_weights(directory, place, resolve_dtype(dtype, place), progress)
    layers = discover(model) if layers is None else attach(layers, model)
    notes = pin_rope(model, limit) + tuple(dict.fromkeys(n for la in layers for n in la.notes))
    set_attention(model, NAME)
    fusions = Fusions()
    if fuse:
        fusions, fusion_notes = fuse_modules(model, layers, limit, max_step_tokens)
        notes += fusion_notes
    for note in notes:
        logger.info("%s: %s", directory.name, note)
    return LoadedModel(
        model=model,
        layers=layers,
        directory=directory,
        name=BUILT_IN_NAME if path is None else directory.resolve().name,
        eos_token_ids=_eos_token_ids(model),
        max_context_tokens=limit,
        fusions=fusions,
        notes=notes,
    )


def check_directory(directory: Path, *, needs_weights: bool = True) -> None:
    """Refuse what is no model, what could run code when it is read, and what needs its own code.

    Args:
        directory: Of the model.
        needs_weights: Whether a config alone is not enough.

    Raises:
        ModelNotSupportedError: The message says what is wrong with the directory.
    """
    if not directory.is_dir():
        raise ModelNotSupportedError(f"{directory} is not a directory with a model in it.")
    raw = _read_json(directory / "config.json")
    if needs_weights and not any(directory.glob("*.safetensors")):
        pickles = sorted(file.name for file in directory.iterdir() if file.suffix in _PICKLES)
        found = f" but {', '.join(pickles)}, and a pickle can run code when read" if pickles else ""
        raise ModelNotSupportedError(
            f"{directory} has no weights in the safetensors format{found}."
            " Save them with save_pretrained, which writes safetensors."
        )
    model_type = raw.get("model_type")
    if model_type not in CONFIG_MAPPING:
        own_code = "comes with its own code, which is never run, and " if "auto_map" in raw else ""
        raise ModelNotSupportedError(
            f"The model in {directory} {own_code}is of type {model_type!r}, which the installed"
            " transformers does not know."
        )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelNotSupportedError(f"{file.parent} has no {file.name}.") from None
    except (OSError, ValueError) as error:
        raise ModelNotSupportedError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ModelNotSupportedError(f"{file} is not a JSON object.")
    return content


def _resolve_device(device: str) -> torch.device:
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise ModelNotSupportedError("Device cuda was asked for, but torch sees no GPU.")
    return torch.device("cuda" if device == "cuda" or (device == "auto" and has_gpu) else "cpu")


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Type of the weights and the KV cache; auto is float32 on a CPU, bfloat16 on a GPU."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    resolved: torch.dtype = getattr(torch, dtype)
    return resolved


def read_config(directory: Path) -> PreTrainedConfig:
    """The model's config.

    Raises:
        ModelNotSupportedError: transformers refuses it.
    """
    try:
        with quiet():
            config: PreTrainedConfig = AutoConfig.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
    except _LOAD_FAILURES as error:
        raise ModelNotSupportedError(f"The config in {directory} is refused: {error}") from error
    return config


def resolve_context(config: PreTrainedConfig, asked: int | None) -> int:
    """The context asked for if the model can do it, else the model's own; tokens.

    Raises:
        ModelNotSupportedError: The model cannot do it, or nobody names a context.
    """
    limit = context_limit(config.get_text_config())
    if limit is None and asked is None:
        raise ModelNotSupportedError(
            "The config names no context length; set SPARSESERVE_MAX_CONTEXT_TOKENS."
        )
    if limit is not None and asked is not None and asked > limit:
        raise ModelNotSupportedError(
            f"A context of {asked} tokens was asked for, but the model's own limit is {limit}."
        )
    return asked or limit or 0


def context_limit(config: PreTrainedConfig) -> int | None:
    """Tokens the model was made for, stretched by YaRN if the config says so; None if unknown."""
    limits = (getattr(config, name, None) for name in _CONTEXT_FIELDS)
    limit = next((int(value) for value in limits if isinstance(value, int) and value > 0), None)
    if limit is None or rope_types(config) != {"yarn"}:
        return limit  # other kinds name the stretched length, or (dynamic) stop at the original
    stretched = [limit]
    for parameters in rope_parameters(config):
        original = parameters.get("original_max_position_embeddings")
        factor = parameters.get("factor")
        if isinstance(original, int) and isinstance(factor, (int, float)):
            stretched.append(int(original * factor))
    return max(stretched)


def _load_weights(
    directory: Path, device: torch.device, dtype: torch.dtype, progress: Progress | None
) -> PreTrainedModel:
    # With accelerate, weights go straight to the GPU; without it, through the CPU's memory.
    has_accelerate = importlib.util.find_spec("accelerate") is not None
    placement = {"device_map": {"": device}} if has_accelerate and device.type != "cpu" else {}
    try:
        with quiet(), reported_progress("weights", progress):
            result: Any = AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                attn_implementation="eager",
                **placement,
            )
            if not placement:
                result[0].to(device)
    except _LOAD_FAILURES as error:
        raise ModelNotSupportedError(f"The weights in {directory} are refused: {error}") from error
    model: PreTrainedModel = result[0]
    _check_complete(directory, result[1])
    # gpt2 and its kin look for padding in the tokens (a sync) and warn; nothing is padded here.
    model.config.pad_token_id = None
    model.eval().requires_grad_(requires_grad=False)
    return model


def _check_complete(directory: Path, report: dict[str, Any]) -> None:
    """Weights that are missing or do not fit would be random numbers."""
    for problem in ("missing_keys", "mismatched_keys"):
        names: Sequence[object] = sorted(map(str, report.get(problem) or ()))
        if names:
            raise ModelNotSupportedError(
                f"{len(names)} weights in {directory} are {problem.removesuffix('_keys')},"
                f" e.g. {names[0]}."
            )


def _eos_token_ids(model: PreTrainedModel) -> tuple[int, ...]:
    """Union of what the generation config and the model's config call the end of a text."""
    generation, config = model.generation_config, model.config.get_text_config()
    found: set[int] = set()
    for value in (getattr(generation, "eos_token_id", None), getattr(config, "eos_token_id", None)):
        found.update([value] if isinstance(value, int) else value or ())
    return tuple(sorted(found))
