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
    output, lse = parts[0]
    for part_output, part_lse in parts[1:]:
        share = torch.sigmoid(part_lse - lse)
        output = torch.lerp(output, part_output, share[..., None].to(output.dtype))
        lse = torch.logaddexp(lse, part_lse)
    return output, lse


def causal_squares(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of rows over their own keys.

    Args:
        query: [t, Hq, n, D].
        keys: [t, Hkv, n, D].
        values: [t, Hkv, n, D].
        scale: Factor of the scores.

    Returns:
        [t, Hkv, G, n, D] and log-sum-exp [t, Hkv, G, n].
    """
    group = query.shape[1] // keys.shape[1]
    keys, values = (part.repeat_interleave(group, 1) for part in (keys, values))
    output, lse = cpu_flash(query, keys, values, is_causal=True, scale=scale)
    return output.unflatten(1, (-1, group)), lse.unflatten(1, (-1, group))
