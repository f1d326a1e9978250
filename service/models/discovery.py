"""What the attention layers of a model are, found by running it once without computing attention.

A config says how a model should be; the dry run says what its code does: which modules attend,
in which order, with which heads, scale and soft cap, and who may see whom.
"""

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from service.errors import ModelNotSupportedError
from service.models.hugging_face import quiet, using_attention
from service.models.probing import (
    PROBE,
    PROBE_WITHOUT_MASK,
    AttentionCall,
    MaskKind,
    Recorder,
)
from sparse_methods.kernels.operation import LayerGeometry

_NUM_TOKENS = 8
_PLAIN_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}
_UNDERSTOOD = {  # kwargs of an attention call that geometry covers, or that change nothing
    "scaling", "dropout", "sliding_window", "softcap", "s_aux", "is_causal", "position_ids",
    "position_embeddings", "cache_position", "attention_mask", "past_key_values", "cache",
    "use_cache", "output_attentions", "output_hidden_states", "output_router_logits", "return_dict",
}  # fmt: skip
_FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, LookupError)
_CHANGES_SCORES = {"position_bias", "indices", "block_indices", "sinks"}


@dataclass(frozen=True)
class DiscoveredLayer:
    """One attention layer.

    Attributes:
        index: Place in the order of execution; not always the model's own ``layer_idx``.
        module: The module that calls the attention function.
        notes: What an operator may want to know, one sentence each.
    """

    index: int
    module_name: str
    module: nn.Module
    geometry: LayerGeometry
    notes: tuple[str, ...] = ()


def discover_on_meta(config: PreTrainedConfig) -> list[DiscoveredLayer] | None:
    """Find the layers before any weight is loaded; None if the model's code needs real tensors.

    Raises:
        ModelNotSupportedError: The model cannot be served; the message says why.
    """
    try:
        return _discover(build_on_meta(config))
    except _FAILURES:  # "meta tensors have no data", in its many wordings
        return None


def build_on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    """A model of this config that has shapes, but no memory and no weights."""
    config = copy.deepcopy(config)  # building a model mutates its config
    with quiet(), torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config,
            dtype=torch.bfloat16,  # the one type for which grouped experts run on meta
            trust_remote_code=False,
        )
    model.eval()
    return model


def discover(model: PreTrainedModel) -> list[DiscoveredLayer]:
    """Find the attention layers of a loaded model, in the order in which they run.

    Raises:
        ModelNotSupportedError: The model cannot be served; the message says why.
    """
    try:
        return _discover(model)
    except _FAILURES as error:
        raise ModelNotSupportedError(
            f"{type(model).__name__} fails without its own mask and cache:"
            f" {type(error).__name__}: {error}"
        ) from error


def attach(layers: Sequence[DiscoveredLayer], model: PreTrainedModel) -> list[DiscoveredLayer]:
    """Point layers found on meta at the modules of the loaded model."""
    return [replace(layer, module=model.get_submodule(layer.module_name)) for layer in layers]


def _discover(model: PreTrainedModel) -> list[DiscoveredLayer]:
    _check_layer_types(model)
    try:
        calls = _dry_run(model, PROBE)
    except (TypeError, AttributeError):  # it computes with its mask: ask it to do without one
        calls = _dry_run(model, PROBE_WITHOUT_MASK)
    _check_calls(model, calls)
    names = {id(module): name for name, module in model.named_modules()}
    return [_layer(index, call, names[id(call.module)]) for index, call in enumerate(calls)]


def _dry_run(model: PreTrainedModel, implementation: str) -> list[AttentionCall]:
    device = next(model.parameters()).device
    with quiet(), torch.no_grad(), using_attention(model, implementation), _recording(model) as run:
        model(
            input_ids=torch.zeros(1, _NUM_TOKENS, dtype=torch.int64, device=device),
            position_ids=torch.arange(_NUM_TOKENS, device=device)[None],
            # Ones keep transformers from looking for packed sequences in the positions.
            attention_mask=torch.ones(1, _NUM_TOKENS, dtype=torch.bool, device=device),
            use_cache=False,
        )
    return run.calls


@contextmanager
def _recording(model: nn.Module) -> Iterator[Recorder]:
    recorder = Recorder()
    modules = list(model.modules())
    for module in modules:
        module.sparseserve_recorder = recorder  # type: ignore[assignment]
    try:
        yield recorder
    finally:
        for module in modules:
            del module.sparseserve_recorder


def _check_layer_types(model: PreTrainedModel) -> None:
    """Refuse layers that carry a state from token to token: a packed batch would mix requests."""
    name, config = type(model).__name__, model.config.get_text_config()
    if config.is_encoder_decoder:
        raise ModelNotSupportedError(f"{name} is an encoder-decoder; only decoders are served.")
    layer_types = getattr(config, "layer_types", None)
    foreign = sorted(set(layer_types or ()) - _PLAIN_LAYER_TYPES)
    if foreign:
        raise ModelNotSupportedError(
            f"{name} has layers of type {', '.join(foreign)}; only layers of type"
            f" {', '.join(sorted(_PLAIN_LAYER_TYPES))} can be served from a paged KV cache."
        )
    is_stateful = any(getattr(module, "_is_stateful", False) for module in model.modules())
    if is_stateful and layer_types is None:
        raise ModelNotSupportedError(
            f"{name} keeps a recurrent state (mamba, linear attention); only attention is served."
        )


def _check_calls(model: PreTrainedModel, calls: Sequence[AttentionCall]) -> None:
    name, config = type(model).__name__, model.config.get_text_config()
    repeated = [m for m, n in Counter(id(call.module) for call in calls).items() if n > 1]
    if repeated:
        raise ModelNotSupportedError(
            f"{name} calls the attention of one module several times per forward pass;"
            " the KV cache holds one entry per module and token."
        )
    if len(calls) < config.num_hidden_layers:
        raise ModelNotSupportedError(
            f"Only {len(calls)} of the {config.num_hidden_layers} layers of {name} call the"
            " attention interface; the others compute or remember something of their own."
        )
    for index, call in enumerate(calls):
        reason = _refusal(call)
        if reason:
            raise ModelNotSupportedError(f"Attention layer {index} of {name} {reason}.")


def _refusal(call: AttentionCall) -> str | None:
    """Why this call cannot be served, as the end of a sentence; None if it can."""
    foreign = sorted(name for name, value in call.kwargs.items() if _is_foreign(name, value))
    is_causal = call.kwargs.get("is_causal")
    if is_causal is None:
        is_causal = getattr(call.module, "is_causal", True)
    tokens = (call.query_shape[2], call.key_shape[2])
    reasons = {
        f"passes {', '.join(foreign)}, which changes the scores in its own way": bool(foreign),
        "is not causal": not is_causal,
        "has a mask that is neither causal, nor a window, nor chunks": call.has_foreign_mask
        or (call.mask is not None and call.mask.kind == "other"),
        f"attends with {tokens[0]} queries to {tokens[1]} keys where {_NUM_TOKENS} tokens came in":
        tokens != (_NUM_TOKENS, _NUM_TOKENS),
        "splits the tokens into a batch of its own": call.query_shape[0] != 1,
        f"has {call.query_shape[1]} heads, not a multiple of its {call.key_shape[1]} KV heads":
        call.query_shape[1] % call.key_shape[1] != 0,
    }  # fmt: skip
    return next((reason for reason, holds in reasons.items() if holds), None)


def _is_foreign(name: str, value: Any) -> bool:  # noqa: ANN401 - whatever a model passes
    """Whether a kwarg may change the result in a way that no geometry describes."""
    if value is None:
        return False
    return name in _CHANGES_SCORES or (name not in _UNDERSTOOD and torch.is_tensor(value))


def _layer(index: int, call: AttentionCall, module_name: str) -> DiscoveredLayer:
    kwargs, notes = call.kwargs, []
    passed_window = int(kwargs.get("sliding_window") or 0)
    mask = call.mask
    if mask is None:
        # Without a mask to ask, the kwarg is all there is.
        mask = MaskKind("window", passed_window) if passed_window else MaskKind("full")
        notes.append("The mask could not be probed; the window is what the model passes.")
    window = mask.size if mask.kind == "window" else 0
    if window != passed_window and call.mask is not None:
        notes.append(f"The mask has a window of {window} tokens, the argument {passed_window}.")
    scaling = kwargs.get("scaling")
    geometry = LayerGeometry(
        num_heads=call.query_shape[1],
        num_kv_heads=call.key_shape[1],
        head_dim=call.query_shape[3],
        value_dim=call.value_shape[3],
        scale=call.query_shape[3] ** -0.5 if scaling is None else float(scaling),
        softcap=float(kwargs.get("softcap") or 0.0),
        window=window,
        chunk=mask.size if mask.kind == "chunk" else 0,
        has_sinks=kwargs.get("s_aux") is not None,
    )
    return DiscoveredLayer(index, module_name, call.module, geometry, tuple(notes))
