"""What a module may be, by the names and the types of its parts; ``surgery`` then compares."""

from torch import nn
from typing_extensions import TypeIs

from service.models.discovery import DiscoveredLayer

EPSILONS = ("variance_epsilon", "eps", "epsilon")
_LAYER_CHILDREN = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}


def is_norm(module: nn.Module) -> bool:
    """Whether this may be a root mean square norm with a weight and nothing else."""
    if "RMSNorm" not in type(module).__name__ or not any(hasattr(module, n) for n in EPSILONS):
        return False
    parameters = dict(module.named_parameters())
    return list(parameters) == ["weight"] and parameters["weight"].ndim == 1


def is_layer(module: nn.Module) -> bool:
    """Whether this may be a decoder layer: attention and an MLP, each behind a norm."""
    children = {n for n, c in module.named_children() if not isinstance(c, nn.Dropout)}
    return children == _LAYER_CHILDREN


def is_linear(module: nn.Module) -> TypeIs[nn.Linear]:
    """Whether this is a linear layer and no more; one with a forward of its own may sum ranks'."""
    return type(module) is nn.Linear and "forward" not in vars(module)


def gate_and_up(module: nn.Module) -> list[nn.Linear]:
    """The linear layers whose outputs are gate and up, in this order; [] if it has none."""
    down = getattr(module, "down_proj", None)
    for names in (("gate_proj", "up_proj"), ("gate_up_proj",)):
        linears = [getattr(module, name, None) for name in names]
        if type(down) is nn.Linear and all(type(linear) is nn.Linear for linear in linears):
            found: list[nn.Linear] = linears  # type: ignore[assignment]
            is_double = sum(linear.out_features for linear in found) == 2 * down.in_features
            return found if is_double else []
    return []


def query_key_value(layer: DiscoveredLayer) -> list[nn.Linear]:
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
