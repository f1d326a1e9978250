"""Where Hugging Face modeling code meets the seam: attention modules know their layer by name.

The attention function is registered under ``NAME``; a module it is called for was bound by ``bind``
to a layer of whatever attends, usually ``PagedAttention``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AttentionInterface

NAME = "sparseserve"


class LayerAttention(Protocol):
    """What attends for the layers of a model: ``PagedAttention``, or what stands in for it."""

    def forward(
        self,
        layer: int,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """See ``PagedAttention.forward``."""

    def kept_rows(self, layer: int) -> torch.Tensor | None:
        """See ``PagedAttention.kept_rows``."""


@dataclass(frozen=True)
class BoundLayer:
    """What an attention module carries to find its cache and its batch."""

    attention: LayerAttention
    index: int


def bind(attention: LayerAttention, modules: Sequence[nn.Module]) -> None:
    """Tell each attention module, in execution order, which layer of ``attention`` it is."""
    for index, module in enumerate(modules):
        module.sparseserve_layer = BoundLayer(attention, index)  # type: ignore[assignment]


def _attention_function(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: object,
    **kwargs: Any,  # noqa: ANN401 - what a model passes is its own affair; discovery looked at it
) -> tuple[torch.Tensor, None]:
    """Bridge from the attention interface: heads come before tokens, and go back after them.

    The module was bound by ``bind``; query is [1, Hq, T, D], key and value [1, Hkv, T, D]; no mask
    comes, as no mask function is registered under our name. Returns [1, T, Hq, Dv].
    """
    if attention_mask is not None:
        raise RuntimeError(f"a mask reached {type(module).__name__}; its batch would be wrong")
    bound: BoundLayer = module.sparseserve_layer  # type: ignore[assignment]
    rows, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    output = bound.attention.forward(bound.index, rows, keys, values, kwargs.get("s_aux"))
    return output.unsqueeze(0), None


AttentionInterface.register(NAME, _attention_function)
