"""What stands in for the forward of a model's modules: fewer kernels, the same numbers.

Each class computes what one kind of Hugging Face module computes, from that module's own weights.
Nothing here is believed: ``surgery`` compares every one with the module it stands for.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from service.models.bridge import BoundLayer
from service.models.kernels.operations import (
    Activation,
    ModuleKernels,
    Norm,
    Projection,
    RotaryHeads,
)


def merge(linears: Sequence[nn.Linear]) -> Projection:
    """Move the weights of linear layers of one input into one matrix, of which they become views.

    Nothing is stored twice, and each layer goes on to compute what it did.
    """
    sizes = tuple(linear.out_features for linear in linears)
    if len(linears) == 1:
        return Projection(linears[0].weight.data, _bias(linears[0]), sizes)
    weight = torch.cat([linear.weight.data for linear in linears])
    for linear, part in zip(linears, weight.split(sizes), strict=True):
        linear.weight.data = part
    biases = [_bias(linear) for linear in linears]
    if all(bias is None for bias in biases):
        return Projection(weight, None, sizes)
    bias = torch.cat(
        [weight.new_zeros(n) if b is None else b for n, b in zip(sizes, biases, strict=True)]
    )
    for linear, part in zip(linears, bias.split(sizes), strict=True):
        if linear.bias is not None:
            linear.bias.data = part
    return Projection(weight, bias, sizes)


class FusedLinear:
    """A linear layer alone, which a device may compute in several ways."""

    def __init__(self, projection: Projection, kernels: ModuleKernels) -> None:
        self._projection = projection
        self._kernels = kernels

    def __call__(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - as PyTorch names it
        """[..., inputs] to [..., outputs]."""
        return self._kernels.linear(input, self._projection)


class FusedNorm:
    """A root mean square norm in one kernel, which may have run already.

    Whoever makes the norm's next input can make its output in the same pass: ``prepare`` leaves it
    here, and the call that comes with that very tensor takes it.
    """

    def __init__(self, norm: Norm, kernels: ModuleKernels) -> None:
        self.norm = norm
        self._kernels = kernels
        self._prepared: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalise [..., H]."""
        prepared, self._prepared = self._prepared, None
        if prepared is not None and prepared[0] is hidden_states:
            return prepared[1]
        return self._kernels.rms_norm(hidden_states, self.norm)

    def add(self, residual: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return residual + rows, [..., H], and the sum normalised."""
        return self._kernels.add_rms_norm(residual, rows, self.norm)

    def prepare(self, residual: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return residual + rows, and keep the sum normalised for the next call."""
        self._prepared = self.add(residual, rows)
        return self._prepared[0]


class FusedMlp:
    """down(activation(gate(x)) * up(x)), with gate and up as one product."""

    def __init__(
        self,
        projection: Projection,
        down: nn.Linear,
        activation: Activation,
        kernels: ModuleKernels,
    ) -> None:
        self._projection = projection
        self._down = down
        self._activation = activation
        self._kernels = kernels

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., H] to [..., H]."""
        product = self._kernels.gated_product(hidden_states, self._projection, self._activation)
        output: torch.Tensor = self._down(product)  # by its forward, which may sum over ranks
        return output


class FusedAttention:
    """One product for queries, keys and values, one pass that norms and turns them, the seam.

    Args:
        module: Says which layer of the seam it is; see ``attention.bind``.
        output: The projection of what attention returns.
        sinks: [Hq] learned logits, if the layer has them.
    """

    def __init__(
        self,
        module: nn.Module,
        projection: Projection,
        output: nn.Linear,
        heads: RotaryHeads,
        kernels: ModuleKernels,
        sinks: torch.Tensor | None = None,
    ) -> None:
        self._module = module
        self._projection = projection
        self._output = output
        self._heads = heads
        self._kernels = kernels
        self._sinks = sinks

    def __call__(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        past_key_values: object = None,
        cache: object = None,
        **_: object,
    ) -> tuple[torch.Tensor, None]:
        """[1, T, H] to [1, T, H]; the angles are [1, T, at least half].

        A cache has another name from transformers 5.24 on.

        Raises:
            RuntimeError: The model keeps a cache of its own.
        """
        if past_key_values is not None or cache is not None:
            raise RuntimeError("fused attention writes to the paged cache only")
        cosines, sines = (angles[0] for angles in position_embeddings)
        heads, projection = self._heads, self._projection
        rows = self._kernels.linear(hidden_states[0], projection)
        queries, keys = self._kernels.rotate(rows, cosines, sines, heads)
        first_value = (heads.num_heads + heads.num_kv_heads) * heads.head_dim
        values = rows[:, first_value:].unflatten(1, (heads.num_kv_heads, -1))
        bound: BoundLayer = self._module.sparseserve_layer  # type: ignore[assignment]
        attended = bound.attention.forward(bound.index, queries, keys, values, self._sinks)
        output: torch.Tensor = self._output(attended.flatten(1))
        return output[None], None


class FusedDecoderLayer:
    """Attention and MLP, each added to the residual in the pass that norms the sum.

    Rows that nobody reads after the last layer's attention skip its MLP; they come back unfinished.

    Args:
        attention: Module whose call returns a tuple that begins with [1, T, H].
        mlp: Module whose call returns [1, T, H], or a tuple that begins with it.
        first: Norm before attention.
        second: Norm before the MLP.
        following: Norm that gets the layer's output, if it is known.
    """

    def __init__(
        self,
        attention: nn.Module,
        mlp: nn.Module,
        first: FusedNorm,
        second: FusedNorm,
        following: FusedNorm | None,
    ) -> None:
        self._attention: Callable[..., Any] = attention
        self._mlp: Callable[..., Any] = mlp
        self._first = first
        self._second = second
        self._following = following

    def __call__(self, hidden_states: torch.Tensor, **kwargs: object) -> torch.Tensor:
        """[1, T, H] to [1, T, H]."""
        attended = self._attention(hidden_states=self._first(hidden_states), **kwargs)[0]
        kept = self._kept_rows()
        if kept is not None and len(kept) < hidden_states.shape[1]:
            if len(kept):
                last = self._after_attention(hidden_states[:, kept], attended[:, kept])
                hidden_states.index_copy_(1, kept, torch.add(*last))
            return hidden_states
        hidden_states, rows = self._after_attention(hidden_states, attended)
        if self._following is None:
            return hidden_states + rows
        return self._following.prepare(hidden_states, rows)

    def _after_attention(
        self, hidden_states: torch.Tensor, attended: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual and what is to be added to it, [1, T, H]."""
        hidden_states, normed = self._second.add(hidden_states, attended)
        output = self._mlp(normed)
        return hidden_states, output[0] if isinstance(output, tuple) else output

    def _kept_rows(self) -> torch.Tensor | None:
        bound: BoundLayer | None = getattr(self._attention, "sparseserve_layer", None)
        return None if bound is None else bound.attention.kept_rows(bound.index)


def _bias(linear: nn.Linear) -> torch.Tensor | None:
    bias: torch.Tensor | None = linear.bias
    return None if bias is None else bias.data
