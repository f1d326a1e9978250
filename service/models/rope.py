"""Rotary embeddings that choose their frequencies by the longest position of a batch, pinned.

``longrope`` has two sets of frequencies and ``dynamic`` stretches one set as a sequence grows; in
transformers both look at the largest position of the whole batch, so in a packed batch one long
request would change the keys of all others, and a request's own keys once it grows.

The rule here is one for all requests, fixed at load: with ``longrope`` the long set if and only if
the served context is longer than the original one, as in vLLM. Departure: a request that stays
within the original context then uses the long set, too, where transformers alone would use the
short one; an operator who wants that serves a context no longer than the original. ``dynamic`` is
served up to ``max_position_embeddings``, where it does not stretch yet and equals transformers.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from service.errors import ModelNotSupportedError

_PINNED = "default"  # the type for which transformers leaves the frequencies alone


class _Embedding(NamedTuple):
    """One set of frequencies of a rotary module; some modules have one per layer type."""

    module: nn.Module
    layer_type: str | None
    rope_type: str
    config: PreTrainedConfig


def pin_rope(model: PreTrainedModel, max_context_tokens: int) -> tuple[str, ...]:
    """Fix the frequencies of ``model`` for good; return a sentence for each thing that was fixed.

    Raises:
        ModelNotSupportedError: The served context is too long for this kind of embedding, or its
            frequencies still depend on the rest of the batch.
    """
    notes: dict[str, None] = {}  # ordered, each sentence once
    for embedding in _embeddings(model):
        if embedding.rope_type == "longrope":
            notes[_pin_longrope(embedding, max_context_tokens)] = None
        elif "dynamic" in embedding.rope_type:
            notes[_pin_dynamic(embedding, max_context_tokens)] = None
        else:
            continue
        _mark_pinned(embedding)
        _check_independent(embedding, max_context_tokens)
    return tuple(notes)


def rope_types(config: PreTrainedConfig) -> set[str]:
    """Kinds of rotary embedding a config asks for."""
    return {str(parameters.get("rope_type", "default")) for parameters in rope_parameters(config)}


def rope_parameters(config: PreTrainedConfig) -> list[dict[str, object]]:
    """The parameters of each rotary embedding: one, or one per layer type."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]


def _embeddings(model: PreTrainedModel) -> Iterator[_Embedding]:
    for module in model.modules():
        rope_type, config = getattr(module, "rope_type", None), getattr(module, "config", None)
        if not isinstance(config, PreTrainedConfig):
            continue
        if isinstance(rope_type, str):
            yield _Embedding(module, None, rope_type, config)
        elif isinstance(rope_type, dict):
            for layer_type, value in rope_type.items():
                yield _Embedding(module, layer_type, value, config)


def _pin_longrope(embedding: _Embedding, max_context_tokens: int) -> str:
    original = _original_context(embedding)
    is_long = max_context_tokens > original
    frequencies, _ = ROPE_INIT_FUNCTIONS["longrope"](
        embedding.config,
        torch.device("cpu"),
        seq_len=original + 1 if is_long else original,
        **_layer_argument(embedding),
    )
    buffer: torch.Tensor = getattr(embedding.module, _prefixed(embedding, "inv_freq"))
    buffer.copy_(frequencies)
    kind = "long" if is_long else "short"
    return (
        f"Every request uses the {kind} factors of longrope, because the served context of"
        f" {max_context_tokens} tokens is {'' if is_long else 'not '}longer than {original}."
    )


def _pin_dynamic(embedding: _Embedding, max_context_tokens: int) -> str:
    limit = int(embedding.config.max_position_embeddings)
    if max_context_tokens > limit:
        raise ModelNotSupportedError(
            f"Dynamic RoPE stretches beyond {limit} tokens by the longest request of a batch, which"
            f" would change the other requests; serve at most {limit} tokens"
            f" (SPARSESERVE_MAX_CONTEXT_TOKENS), not {max_context_tokens}."
        )
    return f"Dynamic RoPE is served up to {limit} tokens, where it does not stretch yet."


def _original_context(embedding: _Embedding) -> int:
    parameters = embedding.config.rope_parameters
    if embedding.layer_type is not None:
        parameters = parameters[embedding.layer_type]
    return int(parameters["original_max_position_embeddings"])


def _layer_argument(embedding: _Embedding) -> dict[str, str]:
    return {} if embedding.layer_type is None else {"layer_type": embedding.layer_type}


def _prefixed(embedding: _Embedding, name: str) -> str:
    return name if embedding.layer_type is None else f"{embedding.layer_type}_{name}"


def _mark_pinned(embedding: _Embedding) -> None:
    """Make transformers skip the update; the forward pass itself reads the buffer only."""
    module = embedding.module
    if embedding.layer_type is None:
        module.rope_type = _PINNED  # type: ignore[assignment]
    else:
        kinds: dict[str, str] = getattr(module, "rope_type")  # noqa: B009 - mypy: not a Tensor
        module.rope_type = {**kinds, embedding.layer_type: _PINNED}  # type: ignore[assignment]


@torch.no_grad()
def _check_independent(embedding: _Embedding, max_context_tokens: int) -> None:
    """A position's embedding must not depend on which other positions are in the batch."""
    buffer: torch.Tensor = getattr(embedding.module, _prefixed(embedding, "inv_freq"))
    x = torch.zeros(1, device=buffer.device)
    near = torch.arange(4, device=buffer.device)
    far = torch.cat([near, torch.tensor([max_context_tokens - 1], device=buffer.device)])
    alone = embedding.module(x, near[None], **_layer_argument(embedding))
    packed = embedding.module(x, far[None], **_layer_argument(embedding))
    # Cosines and sines are a pair of [1, T, D], or complex numbers in one tensor.
    pairs = zip(_tensors(alone), _tensors(packed), strict=True)
    if not all(torch.equal(a, b[:, : len(near)]) for a, b in pairs):
        raise ModelNotSupportedError(
            f"{type(embedding.module).__name__} scales the positions of a request by the longest"
            " request of a batch; requests would change each other."
        )


def _tensors(result: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (result,) if isinstance(result, torch.Tensor) else result
