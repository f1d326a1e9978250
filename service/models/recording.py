"""What the modules of a model are called with, found by running it once with stand-in attention."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from service.models.bridge import bind
from service.models.discovery import DiscoveredLayer
from service.models.hugging_face import quiet

_SEED = 0


@dataclass(frozen=True)
class Call:
    """One call of a module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @property
    def rows(self) -> torch.Tensor | None:
        """The hidden states it came with."""
        first = self.args[0] if self.args else self.kwargs.get("hidden_states")
        return first if isinstance(first, torch.Tensor) else None

    @property
    def has_rows_only(self) -> bool:
        """Whether it came with hidden states and nothing else."""
        return len(self.args) + len(self.kwargs) == 1 and self.rows is not None

    def with_rows(self, rows: torch.Tensor) -> "Call":
        """The same call with other hidden states."""
        if self.args:
            return replace(self, args=(rows, *self.args[1:]))
        return replace(self, kwargs={**self.kwargs, "hidden_states": rows})

    def with_counts(self, counts: Iterable[int]) -> list["Call"]:
        """The same call with other numbers of rows; none if it came with more than rows."""
        rows = self.rows
        if rows is None or not self.has_rows_only:
            return []
        shapes = [(*[1] * (rows.ndim - 2), count, rows.shape[-1]) for count in counts]
        return [self.with_rows(rows.new_empty(shape)) for shape in shapes]

    def in_float32(self) -> "Call":
        """The same call with every tensor of a low precision widened."""
        return replace(self, args=_widened(self.args), kwargs=_widened(self.kwargs))


class StandInAttention:
    """Answers with numbers of its own, and keeps what it was asked.

    Attributes:
        asked: By layer, queries, keys and values, and the sinks if there are any.
    """

    def __init__(self, layers: Sequence[DiscoveredLayer]) -> None:
        self._geometries = [layer.geometry for layer in layers]
        self.asked: dict[int, tuple[torch.Tensor, ...]] = {}

    def forward(
        self,
        layer: int,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """[T, Hq, Dv], the same at every call; see ``PagedAttention.forward`` for the others."""
        self.asked[layer] = (query, keys, values) if sinks is None else (query, keys, values, sinks)
        geometry = self._geometries[layer]
        return random_like(query.new_empty(len(query), geometry.num_heads, geometry.value_dim))

    def kept_rows(self, layer: int) -> None:
        """All rows go on."""


@contextmanager
def standing_in(layers: Sequence[DiscoveredLayer]) -> Iterator[StandInAttention]:
    """Bind the attention modules to a stand-in for a moment."""
    attention, modules = StandInAttention(layers), [layer.module for layer in layers]
    bind(attention, modules)
    try:
        yield attention
    finally:
        for module in modules:
            del module.sparseserve_layer


@torch.no_grad()
def record(
    model: PreTrainedModel, modules: Iterable[nn.Module], max_position: int, num_tokens: int = 24
) -> dict[nn.Module, Call]:
    """Run the model on random tokens at random positions; return the call of each module that ran.

    Its attention must be bound. Of a module that ran several times the last call is kept.
    """
    calls: dict[nn.Module, Call] = {}

    def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:  # noqa: ANN401
        calls[module] = Call(args, kwargs, output)

    hooks = [module.register_forward_hook(keep, with_kwargs=True) for module in modules]
    device = next(model.parameters()).device
    vocab_size = int(model.config.get_text_config().vocab_size)
    cpu = torch.device("cpu")
    draw = partial(torch.randint, size=(1, num_tokens), generator=_generator(cpu))
    try:
        with quiet():
            model(
                input_ids=draw(vocab_size).to(device),
                position_ids=draw(max(1, max_position)).sort().values.to(device),
                attention_mask=None,
                use_cache=False,
            )
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def random_like(tensor: torch.Tensor) -> torch.Tensor:
    """Normal numbers, the same at every call on a device and in every type."""
    generator = _generator(tensor.device)
    drawn = torch.randn(tensor.shape, generator=generator, device=tensor.device)
    return drawn.bfloat16().to(tensor.dtype)  # the other types hold these


def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(_SEED)


def _widened(value: Any) -> Any:  # noqa: ANN401 - whatever a model passes
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.float()
    if isinstance(value, tuple):
        return tuple(_widened(item) for item in value)
    if isinstance(value, dict):
        return {name: _widened(item) for name, item in value.items()}
    return value
