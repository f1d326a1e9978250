"""Module surgery: modules of a loaded model compute in fewer kernels what they computed before.

The model keeps its modules and its weights; a module that is taken gets another ``forward``, and
gives it back while ``suspended``. Recognised by structure, taken by evidence: before anything is
taken it is compared with the original on random input, on the model's device and in its type
(``matching`` has the tolerances). What does not match stays as it is, and a note names it.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from service.models.discovery import DiscoveredLayer
from service.models.fused_modules import (
    FusedAttention,
    FusedDecoderLayer,
    FusedLinear,
    FusedMlp,
    FusedNorm,
    merge,
)
from service.models.fusions import Fusions
from service.models.kernels import pick_module_kernels
from service.models.kernels.operations import ModuleKernels, Norm, Projection, RotaryHeads
from service.models.matching import (
    FAILURES,
    Forward,
    Outputs,
    Read,
    activations,
    mismatch,
    replaced_forward,
)
from service.models.recognition import (
    EPSILONS,
    gate_and_up,
    is_layer,
    is_linear,
    is_norm,
    query_key_value,
)
from service.models.recording import Call, StandInAttention, record, standing_in

_OFFSETS = (0.0, 1.0)
_NOT_RECOGNISED = "has another structure"


def fuse_modules(
    model: PreTrainedModel,
    layers: Sequence[DiscoveredLayer],
    max_context_tokens: int,
    max_step_tokens: int | None = None,
) -> tuple[Fusions, tuple[str, ...]]:
    """Fuse what can be fused.

    Args:
        model: Its attention is ours, see ``hugging_face.set_attention``, and not bound yet.
        layers: Its attention layers.
        max_context_tokens: Rotary positions are tried up to here.
        max_step_tokens: Most tokens of a step; None may be any number.

    Returns:
        What was taken, and a sentence each on what was and what was not.
    """
    fusions, modules = Fusions(), list(model.modules())
    kernels = pick_module_kernels(next(model.parameters()).device, max_step_tokens)
    with standing_in(layers) as attention:
        try:
            calls = record(model, modules, max_context_tokens)
            of_one_row = (
                record(model, modules, max_context_tokens, 1) if kernels[0].OTHER_ROWS else {}
            )
        except FAILURES as error:
            return fusions, (f"No module was fused: {type(error).__name__}: {error}",)
        surgeon = _Surgeon(layers, calls, of_one_row, attention, kernels)
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
        of_one_row: dict[nn.Module, Call],
        attention: StandInAttention,
        kernels: Sequence[ModuleKernels],
    ) -> None:
        self._layers = layers
        self._calls = calls
        self._of_one_row = of_one_row
        self._attention = attention
        self._gating_kernels = kernels
        self._kernels = kernels[-1]
        self._merged: set[nn.Linear] = set()
        self._norms: dict[nn.Module, FusedNorm] = {}
        self._refusals: dict[nn.Module, str] = {}
        self._left_to_others: dict[str, str] = {}
        self.taken: dict[nn.Module, Forward] = {}

    def operate(self) -> None:
        """Fill ``taken``."""
        for module in self._calls:
            if is_norm(module):
                self._take_norm(module)
        for layer in self._layers:
            self._take_attention(layer)
        for module in self._calls:
            linears = gate_and_up(module)
            if linears:
                self._take_mlp(module, linears)
        for module in self._calls:
            if is_layer(module):
                self._take_layer(module)
        self._take_linears()

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
            *(
                f"Some {name} are computed without a library, which {reason}."
                for name, reason in self._left_to_others.items()
                if name not in refused
            ),
        )

    def _take(
        self,
        module: nn.Module,
        candidates: Sequence[Forward],
        read: Read,
        kernels: ModuleKernels | None = None,
    ) -> Forward | None:
        """Take the first candidate that computes with these kernels what the module does."""
        call = self._calls[module]
        calls = [call, *call.with_counts((kernels or self._kernels).OTHER_ROWS)]
        if module in self._of_one_row and not call.has_rows_only:
            calls.append(self._of_one_row[module])
        reason: str | None = _NOT_RECOGNISED
        for candidate in candidates:
            reasons = (mismatch(module, candidate, call, read) for call in calls)
            reason = next((each for each in reasons if each is not None), None)
            if reason is None:
                self._refusals.pop(module, None)
                self.taken[module] = candidate
                return candidate
        self._refusals[module] = reason or _NOT_RECOGNISED
        return None

    def _take_norm(self, module: nn.Module) -> None:
        epsilon = next(getattr(module, name) for name in EPSILONS if hasattr(module, name))
        weight = dict(module.named_parameters())["weight"].data
        norms = [Norm(weight, float(epsilon), offset) for offset in _OFFSETS]
        candidates = [FusedNorm(norm, self._kernels) for norm in norms]
        taken = self._take(module, candidates, _tensor)
        if isinstance(taken, FusedNorm):
            self._norms[module] = taken

    def _take_linears(self) -> None:
        """Linear layers that are merged with no other, where the device has a way of its own."""
        linears = [module for module in self._calls if is_linear(module)]
        for linear in linears if self._kernels.OTHER_ROWS else []:
            if linear not in self._merged:
                self._take(linear, [FusedLinear(merge([linear]), self._kernels)], _tensor)

    def _take_mlp(self, module: nn.Module, linears: list[nn.Linear]) -> None:
        down: nn.Linear = module.down_proj  # type: ignore[assignment]
        merged = merge(linears)
        projection = Projection(merged.weight, merged.bias, (down.in_features,) * 2)
        for kernels in self._gating_kernels:
            candidates = [FusedMlp(projection, down, a, kernels) for a in activations(module)]
            if self._take(module, candidates, _tensor, kernels):
                self._merged |= set(linears)
                break
            self._left_to_others[type(module).__name__] = self._refusals[module]

    def _take_attention(self, layer: DiscoveredLayer) -> None:
        module, geometry, index = layer.module, layer.geometry, layer.index
        linears, output = query_key_value(layer), getattr(module, "o_proj", None)
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

        if self._take(module, candidates, read):
            self._merged |= set(linears)

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
