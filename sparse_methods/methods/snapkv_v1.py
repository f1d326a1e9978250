"""SnapKV: the end of the prompt decides which of its pages the generation reads.

Source: Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation", NeurIPS 2024,
arXiv:2404.14469, algorithm 1. The attention weights of the prompt's last rows, summed over these
rows and smoothed over neighbours, rank the keys; the best ones stay.

Departures: pages instead of single tokens, so that a list of pages is all a kernel needs; smoothing
takes the maximum over neighbouring pages, one on each side by default: the question finds where an
answer begins, and what goes on in the next page would be lost; nothing is destroyed, so a cached
prefix stays whole and the next request may rank it anew; the heads of a group share a list, ranked
by the sum of their weights, where the authors' code stores repeated keys per query head; the first
page, which holds the attention sink, always stays, as does everything from the first of the ranking
rows on; 16 rows rank, where the authors' code has 32 or 64, as rows before a question dilute what
the question looks for.

Score-level equivalent: scores of one row hold nothing of the prompt's rows, so that row ranks.
"""

from typing import ClassVar

import torch
from pydantic import Field
from torch.nn import functional
from typing_extensions import override

from sparse_methods.block_method import SCORE_BLOCK, BlockKnobs, BlockMethod, ScoreTiles
from sparse_methods.kernels.selection import largest
from sparse_methods.registry import register_sparse_method
from sparse_methods.views import DecodeView, PageSelection, Phase, PrefillView


@register_sparse_method("snapkv", version="v1")
class SnapKV(BlockMethod):
    """Decodes from the prompt's pages that its last tokens attended to, and from all newer ones.

    Use it where the question stands at the end of the prompt and the answer is short; pages that
    the question did not look at are never read again.
    """

    source: ClassVar[str] = "arXiv:2404.14469"
    phases: ClassVar[tuple[Phase, ...]] = (Phase.DECODE,)
    measured_break_even: ClassVar[int] = 16_000

    class Knobs(BlockKnobs):
        """How much of the prompt stays visible, and who decides."""

        budget_pages: int = Field(
            32,
            ge=1,
            le=8192,
            description="Pages of the prompt that stay besides its two ends, pages.",
        )
        window: int = Field(
            16, ge=1, le=1024, description="Last rows of the prompt that rank its pages, tokens."
        )
        pooling: int = Field(
            1, ge=0, le=8, description="Neighbours on each side whose rank a page shares, pages."
        )

    knobs: Knobs

    @property
    @override
    def name(self) -> str:
        return "snapkv"

    @override
    def score_pages(self, view: PrefillView) -> torch.Tensor | None:
        first_row = max(view.prompt_len - self.knobs.window, view.position)
        if first_row >= view.kv_len:
            return None
        shape = (view.num_kv_heads, view.num_blocks)
        scores = torch.zeros(shape, device=view.query.device)
        # Tile by tile, so that the sums are those of the whole prompt however it is cut.
        for block in range(first_row // view.block_size, view.num_blocks):
            start = max(first_row, block * view.block_size)
            stop = min((block + 1) * view.block_size, view.kv_len)
            scores[:, : block + 1] += _attention_mass(view, start, stop)
        return scores

    @override
    def num_independent_rows(self, prompt_len: int) -> int:
        return max(0, prompt_len - self.knobs.window)

    @override
    def select_decode(self, view: DecodeView) -> PageSelection | None:
        if view.page_scores is None:
            return None
        scores = view.page_scores[:, :, : view.max_pages]
        window_start = (view.prompt_lens - self.knobs.window).clamp(min=0) // view.page_size
        is_kept = self._keep(scores, window_start[:, None])
        return PageSelection.of(is_kept & view.visible[:, None])

    @override
    def keep_from_scores(self, tiles: ScoreTiles) -> torch.Tensor:
        rows = tiles.scores[:, :, 0, tiles.first_row]  # [B, Hq, M * SCORE_BLOCK], the only query
        masses = rows.softmax(-1).unflatten(-1, (-1, SCORE_BLOCK)).sum(-1)
        first_row = max(tiles.num_keys - self.knobs.window, 0)
        window_start = torch.full(masses.shape[:2], first_row // SCORE_BLOCK, device=masses.device)
        return self._keep(masses, window_start)[:, :, None]

    def _keep(self, masses: torch.Tensor, window_start: torch.Tensor) -> torch.Tensor:
        """The rule: [..., M] bool from the masses [..., M] and the first page that is not ranked.

        Ties fall to the earlier page, so that the batch a row is in does not matter.
        """
        pages = torch.arange(masses.shape[-1], device=masses.device)
        is_forced = (pages == 0) | (pages >= window_start[..., None])
        width = self.knobs.pooling
        pooled = functional.max_pool1d(masses, 2 * width + 1, stride=1, padding=width)
        ranks = pooled.masked_fill(is_forced, -1.0)
        budget = torch.full_like(ranks[..., :1], self.knobs.budget_pages)
        return largest(ranks, budget) | is_forced


def _attention_mass(view: PrefillView, start: int, stop: int) -> torch.Tensor:
    """[Hkv, m] float32, weights that the rows [start, stop) of one tile give to its m blocks."""
    num_blocks = (stop - 1) // view.block_size + 1
    rows = view.query[start - view.position : stop - view.position].float() * view.scale
    groups = rows.unflatten(1, (view.num_kv_heads, -1)).permute(1, 2, 0, 3)  # [Hkv, G, rows, D]
    positions = torch.arange(num_blocks * view.block_size, device=rows.device)
    is_hidden = positions > positions[start:stop, None]
    masses = []
    for head in range(view.num_kv_heads):  # the scores of all heads at once may not fit
        keys = view.keys[:, :, head][view.pages[:num_blocks]].flatten(0, 1).float()
        weights = (groups[head] @ keys.T).masked_fill(is_hidden, float("-inf")).softmax(-1)
        masses.append(weights.unflatten(-1, (num_blocks, -1)).sum((0, 1, 3)))
    return torch.stack(masses)
