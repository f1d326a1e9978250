"""The optimisers: Muon for the matrices inside the blocks, AdamW for embedding and gains."""

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from typing_extensions import override

from tools.default_model.recipe import Recipe

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(update: Tensor, num_rounds: int = 5) -> Tensor:
    """Return the nearest semi-orthogonal matrices to a stack [N, rows, columns], roughly.

    The quintic Newton-Schulz iteration pushes every singular value to about 1 (0.7 to 1.2).
    """
    a, b, c = NEWTON_SCHULZ
    x = update.bfloat16() if update.is_cuda else update
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(num_rounds):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    x = x.mT if tall else x
    orthogonal: Tensor = x.to(update.dtype)
    return orthogonal


class Muon(Optimizer):
    """Momentum with orthogonalised updates (Jordan et al., 2024) and decoupled weight decay.

    Matrices of one shape are orthogonalised in one batch: a small model's step is otherwise
    dominated by launching kernels.
    """

    def __init__(
        self, matrices: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(list(matrices), defaults)

    @torch.no_grad()
    @override
    def step(self, closure: object = None) -> None:  # type: ignore[override]  # never a closure
        """Update the matrices from their gradients."""
        if closure is not None:
            raise ValueError("Muon takes its gradients as they are: call step without a closure.")
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for matrix in group["params"]:
                by_shape[matrix.shape].append(matrix)
            for shape, matrices in by_shape.items():
                stack = torch.stack([self._momentum_update(m, group["momentum"]) for m in matrices])
                size = group["lr"] * math.sqrt(max(1.0, shape[0] / shape[1]))
                for matrix, update in zip(matrices, orthogonalize(stack), strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"])
                    matrix.add_(update, alpha=-size)

    def _momentum_update(self, matrix: nn.Parameter, momentum: float) -> Tensor:
        """Move the matrix's momentum on and return its Nesterov look-ahead."""
        gradient = matrix.grad if matrix.grad is not None else torch.zeros_like(matrix)
        state = self.state[matrix]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(matrix)
        buffer: Tensor = state["momentum"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(buffer, momentum)


def make_optimizers(model: nn.Module, recipe: Recipe) -> list[Optimizer]:
    """Return Muon for the blocks' matrices and AdamW for everything else."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.dim() == 2 and "embed" not in name]
    embedding = [p for name, p in named if "embed" in name]
    gains = [p for _, p in named if p.dim() == 1]
    groups = [
        {"params": embedding, "weight_decay": recipe.weight_decay},
        {"params": gains, "weight_decay": 0.0},
    ]
    return [
        Muon(matrices, recipe.muon_lr, momentum=0.95, weight_decay=recipe.weight_decay),
        AdamW(groups, lr=recipe.adamw_lr, betas=(0.9, 0.95), fused=matrices[0].is_cuda),
    ]


def set_learning_rates(optimizers: list[Optimizer], factor: float) -> None:
    """Scale every group's learning rate from the one it was made with."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.setdefault("full_lr", group["lr"])
            group["lr"] = group["full_lr"] * factor
