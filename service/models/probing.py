"""Stand-ins for attention and mask that record what a model asks of them and compute nothing."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

PROBE = "sparseserve_probe"
PROBE_WITHOUT_MASK = "sparseserve_probe_without_mask"
_HORIZON = 2**20  # positions over which a mask is examined: a wider window counts as none

MaskFunction = Callable[..., torch.Tensor | bool]


class MaskKind(NamedTuple):
    """What a mask does besides hiding the future, and its size in tokens."""

    kind: Literal["full", "window", "chunk", "other"]
    size: int = 0


@dataclass(frozen=True)
class AttentionCall:
    """One call of the attention function during the dry run.

    Attributes:
        query_shape: (batch, heads, tokens, head dim); key_shape and value_shape likewise.
        mask: What the mask says; None if there was no mask to look at.
        has_foreign_mask: The model passed a mask it made itself.
    """

    module: nn.Module
    query_shape: torch.Size
    key_shape: torch.Size
    value_shape: torch.Size
    mask: MaskKind | None
    has_foreign_mask: bool
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Recorder:
    """Carried by every module of the probed model, so that nothing global is needed."""

    calls: list[AttentionCall] = field(default_factory=list)


class MaskProbe:
    """Stands in for a mask and keeps the function that says who may attend to whom."""

    ndim = 4
    shape = (1, 1, 1, 1)
    dtype = torch.bool

    def __init__(self, function: MaskFunction, device: torch.device) -> None:
        self._function = function
        self.device = device

    def to(self, *_args: object, **_kwargs: object) -> Self:
        """Some models move their mask."""
        return self

    @cached_property
    def kind(self) -> MaskKind:
        """Classify the mask by evaluating its function far out."""
        # Most functions are plain arithmetic; some index a tensor of the model's own device.
        device = torch.device("cpu") if self.device.type == "meta" else self.device
        return classify(self._function, device)


def classify(function: MaskFunction, device: torch.device) -> MaskKind:
    """Tell full causal, window and chunk masks apart, whatever the model calls them."""
    keys = torch.arange(_HORIZON + 1, device=device)
    if bool(_visible(function, keys[5], keys[6:64]).any()):
        return MaskKind("other")
    seen = _visible(function, keys[-2], keys[:-1])
    num_seen = int(seen.sum())
    if num_seen == 0 or not bool(seen[-num_seen:].all()):
        return MaskKind("other")
    if num_seen == _HORIZON:
        return MaskKind("full")
    if int(_visible(function, keys[-1], keys).sum()) == num_seen:
        return MaskKind("window", num_seen)
    # Chunks: the first key that does not see the one before it starts the second chunk.
    hides_previous = ~_visible(function, keys[1:], keys[:-1])
    return MaskKind("chunk", int(hides_previous.nonzero()[0]) + 1)


def _visible(function: MaskFunction, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    zero = torch.zeros((), dtype=torch.int64, device=keys.device)
    return torch.as_tensor(function(zero, zero, query, keys), device=keys.device).expand(len(keys))


def _probe_mask(
    *args: Any,  # noqa: ANN401, ARG001 - the interface is transformers', sizes do not matter here
    mask_function: MaskFunction,
    device: torch.device | str = "cpu",
    **kwargs: Any,  # noqa: ANN401, ARG001
) -> MaskProbe:
    return MaskProbe(mask_function, torch.device(device))


def _probe_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: object,
    **kwargs: Any,  # noqa: ANN401 - looking at them is the point
) -> tuple[torch.Tensor, None]:
    recorder: Recorder = module.sparseserve_recorder  # type: ignore[assignment]
    is_probe = isinstance(attention_mask, MaskProbe)
    recorder.calls.append(
        AttentionCall(
            module=module,
            query_shape=query.shape,
            key_shape=key.shape,
            value_shape=value.shape,
            mask=attention_mask.kind if isinstance(attention_mask, MaskProbe) else None,
            has_foreign_mask=attention_mask is not None and not is_probe,
            kwargs=kwargs,
        )
    )
    batch, heads, tokens, _ = query.shape
    return query.new_zeros(batch, tokens, heads, value.shape[3]), None


AttentionInterface.register(PROBE, _probe_attention)
AttentionInterface.register(PROBE_WITHOUT_MASK, _probe_attention)
AttentionMaskInterface.register(PROBE, _probe_mask)
