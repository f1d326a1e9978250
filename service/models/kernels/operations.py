"""A model's matrix products and the passes between them: what goes in, what comes out.

Every implementation in this folder computes them in float32, whatever the type of its tensors, and
rounds once; a product that is gated in a second pass is rounded on the way. ``eager`` defines them.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch

Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True)
class Norm:
    """A root mean square norm: x / sqrt(mean(x^2) + epsilon) * (weight + offset).

    Attributes:
        weight: [H].
        offset: 0, or 1 for models that learn the difference from one.
    """

    weight: torch.Tensor
    epsilon: float
    offset: float


@dataclass(frozen=True)
class Projection:
    """Linear layers of one input, side by side in one matrix.

    Attributes:
        weight: [sum of sizes, in].
        bias: [sum of sizes].
        sizes: Outputs of each layer.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class RotaryHeads:
    """How the heads of one attention layer lie in a row, and how queries and keys are turned.

    Attributes:
        half: Channel c turns with channel c + half, for c < half; channels from 2 * half on stay.
        query_norm: Norm of each query head, over its head_dim channels, before it is turned.
        key_norm: Likewise of each key head.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    half: int
    query_norm: Norm | None = None
    key_norm: Norm | None = None


class ModuleKernels(Protocol):
    """What a device computes; the last dimension of every tensor must be contiguous.

    Attributes:
        OTHER_ROWS: Numbers of rows whose products go another way than those of a few dozen.
    """

    OTHER_ROWS: tuple[int, ...]

    def rms_norm(self, rows: torch.Tensor, norm: Norm) -> torch.Tensor:
        """Normalise ``rows`` [..., H]."""

    def add_rms_norm(
        self, residual: torch.Tensor, rows: torch.Tensor, norm: Norm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return residual + rows, both [..., H], and the sum normalised."""

    def linear(self, rows: torch.Tensor, projection: Projection) -> torch.Tensor:
        """The projection of ``rows`` [..., K]: [..., sum of sizes]."""

    def gated_product(
        self, rows: torch.Tensor, projection: Projection, activation: Activation
    ) -> torch.Tensor:
        """activation(gate) * up, [..., I], of the two parts of the projection of ``rows``."""

    def rotate(
        self, rows: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, heads: RotaryHeads
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries [T, Hq, D] and keys [T, Hkv, D], turned.

        ``rows`` [T, at least (Hq + Hkv) * D] hold queries, then keys; of the angles [T, at least
        half] the first ``half`` columns are read.
        """
