"""Module surgery: modules of a loaded model compute in fewer kernels what they computed before.

The model keeps its modules and its weights; a module that is taken gets another ``forward``, and
gives it back while ``suspended``. Recognised by structure, taken by evidence: before anything is
taken it is compared with the original on random input, on the model's device and in its type
(``matching`` has the tolerances). What does not match stays as it is, and a note names it.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from service.models.discovery import DiscoveredLayer
from service.models.fused_modules import (
    FusedAttention,
    FusedDecoderLayer,
    FusedMlp,
    FusedNorm,
    merge,
)
from service.models.kernels import pick_module_kernels
from service.models.kernels.operations import Norm, Projection, RotaryHeads
from service.models.matching import (
    FAILURES,
    Forward,
    Outputs,
    Read,
    activations,
    mismatch,
    replaced_forward,
)
from service.models.recording import Call, StandInAttention, record, standing_in

_EPSILONS = ("variance_epsilon", "eps", "epsilon")
_OFFSETS = (0.0, 1.0)
_LAYER_CHILDREN = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_NOT_RECOGNISED = "has another structure"


class Fusions:
    """The modules of one model that compute with fewer kernels."""

    def __init__(self) -> None:
        self._forwards: dict[nn.Module, Forward] = {}

    def install(self, forwards: dict[nn.Module, Forward]) -> None:
        """Let the modules compute this from now on."""
        for module, forward in forwards.items():
            module.forward = forward
        self._forwards |= forwards

    def remove(self) -> None:
        """Let the modules compute for good what they did before surgery."""
        for module in self._forwards:
            del module.forward
        self._forwards = {}

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The modules that were taken."""
        return tuple(self._forwards)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Let the modules compute what they did before surgery, for a moment."""
        for module in self._forwards:
            del module.forward
        try:
            yield
        finally:
            self.install(self._forwards)


def fuse_modules(
    model: PreTrainedModel, layers: Sequence[DiscoveredLayer], max_context_tokens: int
) -> tuple[Fusions, tuple[str, ...]]:
    """Fuse what can be fused.

    Args:
        model: Its attention is ours, see ``hugging_face.set_attention``, and not bound yet.
        layers: Its attention layers.
        max_context_tokens: Rotary positions are tried up to here.

    Returns:
        What was taken, and a sentence each on what was and what was not.
    """
    fusions = Fusions()
    with standing_in(layers) as attention:
        try:
            calls = record(model, list(model.modules()), max_context_tokens)
        except FAILURES as error:
            return fusions, (f"No module was fused: {type(error).__name__}: {error}",)
        surgeon = _Surgeon(layers, calls, attention)
        surgeon.operate()
    fusions.install(surgeon.taken)
    if next(model.parameters()).device.type == "cuda":
        torch.cuda.empty_cache()  # what comparing took is free for the KV cache
    return fusions, surgeon.notes()


class _Surgeon:
    """Proposes and compares, from the parts to the whole; changes no forward itself."""

    def __init__(
        self,
        layers: Sequence[DiscoveredLayer],
        calls: dict[nn.Module, Call],
        attention: StandInAttention,
    ) -> None:
        self._layers = layers
        self._calls = calls
        self._attention = attention
        device = next(parameter.device for m in calls for parameter in m.parameters())
        self._kernels = pick_module_kernels(device)
        self._norms: dict[nn.Module, FusedNorm] = {}
        self._refusals: dict[nn.Module, str] = {}
        self.taken: dict[nn.Module, Forward] = {}

    def operate(self) -> None:
        """Fill ``taken``."""
        for module in self._calls:
            if _is_norm(module):
                self._take_norm(module)
        for layer in self._layers:
            self._take_attention(layer)
        for module in self._calls:
            gate_and_up = _gate_and_up(module)
            if gate_and_up:
                self._take_mlp(module, gate_and_up)
        for module in self._calls:
            children = {n for n, c in module.named_children() if not isinstance(c, nn.Dropout)}
            if children == _LAYER_CHILDREN:
                self._take_layer(module)

    def notes(self) -> tuple[str, ...]:
        """A sentence on what was taken, and one for each kind of module that was not."""
        taken = Counter(type(module).__name__ for module in self.taken)
        listed = ", ".join(f"{count} {name}" for name, count in taken.items())
        reasons: dict[str, str] = {}
        refused = Counter(type(module).__name__ for module in self._refusals)
        for module, reason in self._refusals.items():
            reasons.setdefault(type(module).__name__, reason)
        return (
            f"Fused after comparison: {listed or 'nothing'}.",
            *(f"{n} {name} left as they are: {reasons[name]}." for name, n in refused.items()),
        )

    def _take(self, module: nn.Module, candidates: Sequence[Forward], read: Read) -> Forward | None:
        """Take the first candidate that computes what the module does."""
        reason: str | None = _NOT_RECOGNISED
        for candidate in candidates:
            reason = mismatch(module, candidate, self._calls[module], read)
            if reason is None:
                self.taken[module] = candidate
                return candidate
        self._refusals[module] = reason or _NOT_RECOGNISED
        return None

    def _take_norm(self, module: nn.Module) -> None:
        epsilon = next(getattr(module, name) for name in _EPSILONS if hasattr(module, name))
        weight = dict(module.named_parameters())["weight"].data
        candidates = [
            FusedNorm(Norm(weight, float(epsilon), offset), self._kernels) for offset in _OFFSETS
        ]
        taken = self._take(module, candidates, _tensor)
        if isinstance(taken, FusedNorm):
            self._norms[module] = taken

    def _take_mlp(self, module: nn.Module, gate_and_up: list[nn.Linear]) -> None:
        down: nn.Linear = module.down_proj  # type: ignore[assignment]
        merged = merge(gate_and_up)
        projection = Projection(merged.weight, merged.bias, (down.in_features,) * 2)
        candidates = [FusedMlp(projection, down, a, self._kernels) for a in activations(module)]
        self._take(module, candidates, _tensor)

    def _take_attention(self, layer: DiscoveredLayer) -> None:
        module, geometry, index = layer.module, layer.geometry, layer.index
        linears, output = _query_key_value(layer), getattr(module, "o_proj", None)
        angles = self._calls[module].kwargs.get("position_embeddings")
        head_norms = self._head_norms(module, geometry.head_dim)
        is_known = isinstance(angles, tuple) and len(angles) == 2 and head_norms is not None
        if not is_known or not linears or type(output) is not nn.Linear or head_norms is None:
            self._refusals[module] = _NOT_RECOGNISED
            return
        width = angles[0].shape[-1]  # type: ignore[index]
        sizes = (geometry.num_heads, geometry.num_kv_heads, geometry.head_dim)
        projection = merge(linears)
        candidates = [
            FusedAttention(
                module,
                projection,
                output,
                RotaryHeads(*sizes, half, *head_norms),
                self._kernels,
                getattr(module, "sinks", None) if geometry.has_sinks else None,
            )
            for half in (width // 2, width)  # the angles of both halves, or of one
            if 0 < 2 * half <= geometry.head_dim
        ]

        def read(result: Any) -> Outputs:  # noqa: ANN401 - whatever a module returns
            attended, weights = result
            if weights is not None:
                raise TypeError("attention weights were returned")
            return *self._attention.asked[index], attended

        self._take(module, candidates, read)

    def _head_norms(
        self, module: nn.Module, head_dim: int
    ) -> tuple[Norm | None, Norm | None] | None:
        """Norms of query heads and key heads; None if they norm something else, or only one."""
        names = [name for name, _ in module.named_children() if "norm" in name]
        if not names:
            return None, None
        norms = [self._norms.get(getattr(module, n, module)) for n in ("q_norm", "k_norm")]
        found = [fused.norm for fused in norms if fused and len(fused.norm.weight) == head_dim]
        return (found[0], found[1]) if len(found) == len(names) == 2 else None

    def _take_layer(self, module: nn.Module) -> None:
        children = dict(module.named_children())
        attention, mlp = children["self_attn"], children["mlp"]
        first = self._norms.get(children["input_layernorm"])
        second = self._norms.get(children["post_attention_layernorm"])
        call = self._calls[module]
        if first is None or second is None or mlp not in self._calls or call.args[1:]:
            self._refusals[module] = _NOT_RECOGNISED
            return
        following = next(
            (norm for m, norm in self._norms.items() if self._calls[m].rows is call.output), None
        )
        fused = FusedDecoderLayer(attention, mlp, first, second, following)
        is_tuple = isinstance(self._calls[mlp].output, tuple)

        def stand_in_attention(hidden_states: torch.Tensor, **_: object) -> object:
            return hidden_states.tanh(), None

        def stand_in_mlp(rows: torch.Tensor) -> object:
            return (rows.sin(), None) if is_tuple else rows.sin()

        def read(result: Any) -> Outputs:  # noqa: ANN401 - whatever a module returns
            [rows] = _tensor(result)
            return (rows,) if following is None else (rows, following(rows))

        # What the parts compute was compared before; here it matters what becomes of it.
        with replaced_forward({attention: stand_in_attention, mlp: stand_in_mlp}):
            self._take(module, [fused], read)


def _tensor(result: Any) -> Outputs:  # noqa: ANN401 - whatever a module returns
    if not isinstance(result, torch.Tensor):
        raise TypeError(f"a {type(result).__name__} was returned")
    return (result,)


def _is_norm(module: nn.Module) -> bool:
    """Whether this may be a root mean square norm with a weight and nothing else."""
    if "RMSNorm" not in type(module).__name__ or not any(hasattr(module, n) for n in _EPSILONS):
        return False
    parameters = dict(module.named_parameters())
    return list(parameters) == ["weight"] and parameters["weight"].ndim == 1


def _gate_and_up(module: nn.Module) -> list[nn.Linear]:
    """The linear layers whose outputs are gate and up, in this order; [] if it has none."""
    down = getattr(module, "down_proj", None)
    for names in (("gate_proj", "up_proj"), ("gate_up_proj",)):
        linears = [getattr(module, name, None) for name in names]
        if type(down) is nn.Linear and all(type(linear) is nn.Linear for linear in linears):
            found: list[nn.Linear] = linears  # type: ignore[assignment]
            is_double = sum(linear.out_features for linear in found) == 2 * down.in_features
            return found if is_double else []
    return []


def _query_key_value(layer: DiscoveredLayer) -> list[nn.Linear]:
    """The linear layers whose outputs are queries, keys, values, in this order; [] if none."""
    geometry = layer.geometry
    width = (
        geometry.num_heads * geometry.head_dim
        + geometry.num_kv_heads * (geometry.head_dim + geometry.value_dim)
    )  # fmt: skip
    for names in (("q_proj", "k_proj", "v_proj"), ("qkv_proj",)):
        linears = [getattr(layer.module, name, None) for name in names]
        if all(type(linear) is nn.Linear for linear in linears):
            found: list[nn.Linear] = linears  # type: ignore[assignment]
            return found if sum(linear.out_features for linear in found) == width else []
    return []
