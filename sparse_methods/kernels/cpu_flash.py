"""PyTorch's flash attention for CPUs with its log-sum-exp, and how partial results are merged."""

import torch

# The operator behind scaled_dot_product_attention on a CPU; the public name hides the log-sum-exp.
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001


def flash(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend without a mask: query [h, G, n, D], keys and values [h, m, D].

    The heads of a group are folded into the rows, so that no key is repeated.
    """
    output, lse = cpu_flash(
        query.flatten(1, 2)[None], keys[None], values[None], is_causal=False, scale=scale
    )
    return output[0].view(*query.shape[:3], -1), lse[0].view(query.shape[:3])


def cpu_flash(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    is_causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of [1, h, n, D] queries over [1, h, m, D] keys."""
    output, lse = _FLASH(query, keys, values, 0.0, is_causal, scale=scale)
    return output, lse


def merge(
    parts: list[tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Combine attention over disjoint keys by the log-sum-exp of each part."""
    if len(parts) == 1:
        return parts[0]
    lse = torch.stack([part_lse for _, part_lse in parts]).logsumexp(0)
    weights = [(part_lse - lse).exp()[..., None] for _, part_lse in parts]
    output = sum(output * weight for (output, _), weight in zip(parts, weights, strict=True))
    assert isinstance(output, torch.Tensor)
    return output, lse
