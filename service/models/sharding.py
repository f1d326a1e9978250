"""One model over several ranks: every rank keeps its share of heads, of MLP channels, of logits.

Which layers are cut, and how, is the plan that the model's own code in transformers brings
(``tp_plan``); cutting is ours, so that what is left are plain modules with fewer heads, which the
seam, the fused modules and CUDA graphs take like any others. The plan is not believed: rank 0
computes a few logits with the whole model first, and the self-test compares the ranks with them.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from service.errors import ModelNotSupportedError
from service.models.discovery import DiscoveredLayer
from service.models.fusions import Fusions
from service.models.loading import LoadedModel
from service.models.self_test import plain_reference
from service.models.surgery import fuse_modules
from service.parallel.group import RankGroup

_BY_COLUMNS, _BY_ROWS = "colwise", "rowwise"
# Kept whole on every rank: nothing is computed with an embedding, and a head's norm is tiny.
_WHOLE = {"embedding_rowwise", "replicated_with_grad_allreduce", "replicated"}


def shard_model(
    loaded: LoadedModel, group: RankGroup, *, fuse: bool, max_step_tokens: int | None = None
) -> LoadedModel:
    """Keep this rank's share of a model that lies whole in the host's memory.

    Args:
        loaded: Not fused; its attention modules are not bound yet. It is changed.
        group: All ranks, each of which does the same.
        fuse: Whether modules are fused where that gives the same numbers, on all ranks.
        max_step_tokens: Most tokens of a step; None may be any number.

    Raises:
        ModelNotSupportedError: The model cannot be divided among so many ranks; the message names
            what is in the way.
    """
    model = loaded.model
    check_heads(loaded.layers, group.size)
    cuts = _cuts(model, group.size)
    _check_attention(loaded.layers, cuts)
    reference = plain_reference(loaded) if group.rank == 0 else None
    for module, style in cuts.items():
        _cut(module, style, group)
    _cut_logits(model, group)
    nn.Module.to(model, group.device)
    layers = [_local(layer, group.size) for layer in loaded.layers]
    notes = (*loaded.notes, f"Each of {group.size} ranks holds its share of the heads.")
    fusions = Fusions()
    if fuse:
        fusions, fusion_notes = _fuse_alike(
            model, layers, loaded.max_context_tokens, max_step_tokens, group
        )
        notes += fusion_notes
    return replace(loaded, layers=layers, fusions=fusions, notes=notes, reference=reference)


def check_heads(layers: Sequence[DiscoveredLayer], num_ranks: int) -> None:
    """Refuse heads that cannot be dealt out evenly.

    Raises:
        ModelNotSupportedError: With the numbers.
    """
    for layer in layers:
        geometry = layer.geometry
        for count, what in ((geometry.num_kv_heads, "KV"), (geometry.num_heads, "query")):
            if count % num_ranks:
                raise ModelNotSupportedError(
                    f"The {count} {what} heads of attention layer {layer.index} cannot be divided"
                    f" among {num_ranks} ranks; use a number of ranks that divides {count}."
                )


@dataclass(frozen=True)
class _SummedRows:
    """The forward of a linear layer of whose inputs each rank has a share."""

    linear: nn.Linear
    group: RankGroup

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., share of the inputs] to [..., outputs], the same on all ranks."""
        outputs = self.group.sum(functional.linear(inputs, self.linear.weight))
        bias = _bias(self.linear)
        return outputs if bias is None else outputs + bias


@dataclass(frozen=True)
class _JoinedColumns:
    """The forward of a linear layer of whose outputs each rank computes a share."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    group: RankGroup

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., inputs] to [..., all outputs], the same on all ranks."""
        return self.group.join_columns(functional.linear(inputs, self.weight, self.bias))


def _cuts(model: PreTrainedModel, num_ranks: int) -> dict[nn.Linear, str]:
    """How each linear layer of the plan is cut, the output embedding left out."""
    name, plan = type(model).__name__, _plan(model)
    cuts: dict[nn.Linear, str] = {}
    for path, module in model.named_modules():
        style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", path))
        if style is None or style in _WHOLE or module is model.get_output_embeddings():
            continue
        if style not in {_BY_COLUMNS, _BY_ROWS} or type(module) is not nn.Linear:
            raise ModelNotSupportedError(
                f"{name} cannot be divided among ranks: the plan of transformers cuts {path} in the"
                f" style {style!r}, and only linear layers by {_BY_COLUMNS!r} and {_BY_ROWS!r} are."
            )
        size = module.out_features if style == _BY_COLUMNS else module.in_features
        if size % num_ranks:
            raise ModelNotSupportedError(
                f"The {size} channels of {path} cannot be divided among {num_ranks} ranks."
            )
        cuts[module] = style
    return cuts


def _plan(model: PreTrainedModel) -> Mapping[str, str]:
    plan: Mapping[str, str] | None = getattr(model, "tp_plan", None)
    if not plan:
        raise ModelNotSupportedError(
            f"{type(model).__name__} has no tensor parallel plan in transformers."
        )
    return plan


def _check_attention(layers: Sequence[DiscoveredLayer], cuts: Mapping[nn.Linear, str]) -> None:
    """Refuse a plan that leaves attention whole: every rank would keep the whole KV cache."""
    for layer in layers:
        linears = [m for m in layer.module.modules() if isinstance(m, nn.Linear)]
        styles = {cuts.get(linear, "none") for linear in linears}
        if styles != {_BY_COLUMNS, _BY_ROWS} or layer.geometry.has_sinks:
            raise ModelNotSupportedError(
                f"The plan of transformers does not divide the heads of {layer.module_name}"
                f" ({type(layer.module).__name__}) among ranks."
            )


@torch.no_grad()
def _cut(linear: nn.Linear, style: str, group: RankGroup) -> None:
    """Keep the share of this rank; cutting by rows, what the ranks compute is summed."""
    if style == _BY_COLUMNS:
        linear.out_features //= group.size
        linear.weight.data = _share(linear.weight.data, 0, group)
        if _bias(linear) is not None:
            linear.bias.data = _share(linear.bias.data, 0, group)
    else:
        linear.in_features //= group.size
        linear.weight.data = _share(linear.weight.data, 1, group)
        linear.forward = _SummedRows(linear, group)  # type: ignore[assignment, method-assign]


def _bias(linear: nn.Linear) -> torch.Tensor | None:
    bias: torch.Tensor | None = linear.bias
    return bias


def _share(tensor: torch.Tensor, axis: int, group: RankGroup) -> torch.Tensor:
    """A copy on the rank's device, so that the whole can be freed."""
    share = tensor.chunk(group.size, axis)[group.rank]
    return share.to(group.device, copy=True).contiguous()


@torch.no_grad()
def _cut_logits(model: PreTrainedModel, group: RankGroup) -> None:
    """Let each rank compute a share of the logits, if the vocabulary can be divided."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.out_features % group.size:
        return
    if head.weight is model.get_input_embeddings().weight:  # which is needed whole: share a view
        head.to(group.device)
        weight = head.weight.data.chunk(group.size)[group.rank]
    else:
        head.weight.data = weight = _share(head.weight.data, 0, group)
    bias = _bias(head)
    if bias is not None:
        bias = _share(bias, 0, group)
    head.forward = _JoinedColumns(weight, bias, group)  # type: ignore[assignment, method-assign]


def _local(layer: DiscoveredLayer, num_ranks: int) -> DiscoveredLayer:
    geometry = layer.geometry
    heads = geometry.num_heads // num_ranks, geometry.num_kv_heads // num_ranks
    return replace(layer, geometry=replace(geometry, num_heads=heads[0], num_kv_heads=heads[1]))


def _fuse_alike(
    model: PreTrainedModel,
    layers: Sequence[DiscoveredLayer],
    max_context_tokens: int,
    max_step_tokens: int | None,
    group: RankGroup,
) -> tuple[Fusions, tuple[str, ...]]:
    """Fuse the same modules on all ranks, each of which compares its own share."""
    with group.apart():
        fusions, notes = fuse_modules(model, layers, max_context_tokens, max_step_tokens)
    names = {module: name for name, module in model.named_modules()}
    if group.agrees_on(sorted(names[module] for module in fusions.modules)):
        return fusions, notes
    fusions.remove()
    return Fusions(), ("No module was fused: the ranks would fuse different ones.",)
