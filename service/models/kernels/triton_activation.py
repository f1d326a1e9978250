"""The activations that open gates, for kernels that gate a product."""

import triton
import triton.language as tl


@triton.jit
def activated(gate, IS_SILU: tl.constexpr):
    """SiLU of float32, or GELU in its approximation by tanh."""
    if IS_SILU:
        argument = gate
    else:  # (1 + tanh(z)) / 2 is the sigmoid of 2 z
        argument = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    return gate * tl.sigmoid(tl.maximum(argument, -80.0))  # exp of more than 88 overflows
