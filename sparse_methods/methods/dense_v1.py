"""Dense: read everything. The baseline every other method is measured against.

Source: Vaswani et al., "Attention Is All You Need", NeurIPS 2017, arXiv:1706.03762, section 3.2.
"""

from typing import Any, ClassVar

import torch
from typing_extensions import override

from sparse_methods.method import SparseAttentionMethod
from sparse_methods.registry import register_sparse_method
from sparse_methods.views import Phase


@register_sparse_method("dense", version="v1")
class Dense(SparseAttentionMethod):
    """Exact attention: every block is read, none is skipped.

    Use it as the baseline, and wherever an approximation is not acceptable.
    """

    phases: ClassVar[tuple[Phase, ...]] = ()
    source: ClassVar[str] = "arXiv:1706.03762"

    @property
    @override
    def name(self) -> str:
        return "dense"

    @override
    def calculate_sparsity(
        self, attention_scores: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        stats = {
            "sparsity": 0.0,
            "total_blocks": 0,  # dense attention decides on no blocks
            "sparse_blocks": 0,
            "phase": "decode" if attention_scores.shape[-2] == 1 else "prefill",
            "sample_length": attention_scores.shape[-1],
        }
        return torch.ones_like(attention_scores, dtype=torch.bool), stats

    @override
    def apply_sparsity(
        self, attention_scores: torch.Tensor, sparse_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        if sparse_mask is None:
            return attention_scores
        return super().apply_sparsity(attention_scores, sparse_mask)
