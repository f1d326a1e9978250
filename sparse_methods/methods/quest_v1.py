"""Quest: read the pages whose keys could score highest for the query at hand.

Source: Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", ICML
2024, arXiv:2406.10774, section 3.3; ``top_p`` follows Lin et al., "Twilight", NeurIPS 2025,
arXiv:2502.02770. A page's summary holds the least and the largest value of each channel of its keys
after RoPE, so sum_d max(q_d * min_d, q_d * max_d) bounds every score of the page.

Departures: a page has the engine's size (128 keys by default, 16 in the paper), so bounds are
looser, and a fixed budget small enough to matter loses planted facts on the built-in model. By
default ``top_p`` therefore decides, within a budget that seldom does. It estimates a page's weight
from its mean key, where Twilight multiplies by keys in 4 bits: spread within a page adds weight, so
pages that stand out are underestimated, and more is read than the share says. Pages are taken in
the order of their bounds, which notice one outstanding key where a mean does not. The heads of a
group share a list: bounds are summed over them, weights averaged. The first page, which holds the
attention sink, always stays beside the row's own. No layer is dense by default, as two dense ones
did not help the built-in model.

Score-level equivalent: the largest score of a page is its tightest bound; the mean score is exact.
"""

from typing import ClassVar

import torch
from pydantic import Field
from typing_extensions import override

from sparse_methods.block_method import BlockKnobs, BlockMethod, ScoreTiles
from sparse_methods.kernels import selection
from sparse_methods.registry import register_sparse_method
from sparse_methods.views import DecodeView, PageSelection, PageSummaries, Phase


@register_sparse_method("quest", version="v1")
class Quest(BlockMethod):
    """Decodes from the pages whose channel-wise bounds promise the query the largest scores.

    Use it to decode from long contexts: every token chooses anew, so nothing is lost for good.
    """

    source: ClassVar[str] = "arXiv:2406.10774"
    phases: ClassVar[tuple[Phase, ...]] = (Phase.DECODE,)
    measured_break_even: ClassVar[int] = 16_000
    uses_summaries: ClassVar[bool] = True

    class Knobs(BlockKnobs):
        """How many pages are read."""

        budget_pages: int = Field(
            64,  # 8192 tokens, the candidates of Twilight
            ge=2,
            le=8192,
            description="Most pages a row reads, the first and its own included, pages.",
        )
        top_p: float | None = Field(
            0.8,
            gt=0,
            lt=1,
            description="Estimated share of the weight at which to stop; null fills the budget.",
        )
        dense_layers: int = Field(
            0, ge=0, le=1024, description="First layers that read every page, layers."
        )

    knobs: Knobs

    @property
    @override
    def name(self) -> str:
        return "quest"

    @override
    def select_decode(self, view: DecodeView) -> PageSelection | None:
        if view.layer < self.knobs.dense_layers:
            return None
        if view.summaries is None:
            raise ValueError("the view holds no page summaries")
        if selection.has_kernels(view.query):
            from sparse_methods.kernels.triton_pages import select_by_bounds

            return select_by_bounds(view, view.summaries, self.knobs.budget_pages, self.knobs.top_p)
        bounds = _bounds(view, view.summaries)
        weights = None if self.knobs.top_p is None else _weights(view, view.summaries)
        own_pages = view.own_pages[:, None].expand(-1, view.num_kv_heads)
        indices, counts = self._keep(bounds, weights, own_pages)
        return PageSelection(indices.to(torch.int32), counts.to(torch.int32))

    @override
    def keep_from_scores(self, tiles: ScoreTiles) -> torch.Tensor:
        blocks = tiles.by_block()[:, :, :, tiles.first_row]  # [B, Hq, 1, M, keys], the only query
        own_blocks = tiles.tile_blocks.expand(blocks.shape[:2])
        is_visible = blocks > float("-inf")
        num_keys = is_visible.sum(-1)
        means = blocks.masked_fill(~is_visible, 0.0).sum(-1) / num_keys.clamp(min=1)
        # The axis of the only tile stands where a group's heads do: a group of one.
        indices, counts = self._keep(blocks.amax(-1), num_keys.log() + means, own_blocks)
        is_used = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
        table = torch.zeros_like(blocks[:, :, 0, :, 0], dtype=torch.bool)
        return table.scatter(-1, indices, is_used)[:, :, None]

    def _keep(
        self, bounds: torch.Tensor, weights: torch.Tensor | None, own_pages: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The rule.

        Args:
            bounds: [..., G, M] bound on the scores of each page, -inf where none is visible.
            weights: [..., G, M] log of the weight of each page, likewise; None fills the budget.
            own_pages: [...] number of the row's own page.

        Returns:
            [..., C] pages, the own one, the first one, then by falling rank, and [...] how many.
            C never depends on a length, so a captured graph stays valid while a sequence grows.
        """
        ranks = bounds.sum(-2)
        ranks[..., 0] = torch.finfo(ranks.dtype).max
        ranks = ranks.scatter(-1, own_pages[..., None].long(), float("inf"))
        best = ranks.topk(min(self.knobs.budget_pages, ranks.shape[-1])).indices
        counts = own_pages.clamp(max=best.shape[-1] - 1) + 1
        if weights is None or self.knobs.top_p is None:
            return best, counts
        shares = weights.softmax(-1).mean(-2).gather(-1, best)
        shares_before = shares.cumsum(-1) - shares
        num_needed = (shares_before < self.knobs.top_p).sum(-1).clamp(min=2)
        return best, torch.minimum(counts, num_needed)


def _bounds(view: DecodeView, summaries: PageSummaries) -> torch.Tensor:
    """[R, Hkv, G, M] float32, no score of the page is larger; -inf where none is visible."""
    query = view.query_groups().float() * view.scale
    bounds = query.clamp(min=0) @ _by_head(summaries.maximum, view)
    bounds += query.clamp(max=0) @ _by_head(summaries.minimum, view)
    return bounds.masked_fill(~view.visible[:, None, None], float("-inf"))


def _weights(view: DecodeView, summaries: PageSummaries) -> torch.Tensor:
    """[R, Hkv, G, M] float32, estimate of the log of the page's sum of exp(score), or -inf."""
    starts = torch.arange(view.max_pages, device=view.query.device) * view.page_size
    counts = (view.kv_lens[:, None] - starts).clamp(1, view.page_size)[:, None, None]
    query = view.query_groups().float() * view.scale
    products = query @ _by_head(summaries.total, view)
    own_products = query @ _own_total(view)[..., None]
    own_pages = view.own_pages.long()[:, None, None, None].expand_as(own_products)
    weights = counts.log() + products.scatter(-1, own_pages, own_products) / counts
    return weights.masked_fill(~view.visible[:, None, None], float("-inf"))


def _own_total(view: DecodeView) -> torch.Tensor:
    """[R, Hkv, D] float32, sum of the keys of the row's own page, up to the row's.

    Its summary may hold keys of later rows: a request that starts over recomputes them together.
    """
    own_pages = view.own_pages.long()[:, None]
    keys = view.keys[view.pages.gather(1, own_pages)[:, 0]]  # [R, page_size, Hkv, D]
    slots = own_pages * view.page_size + torch.arange(view.page_size, device=keys.device)
    is_later = slots >= view.kv_lens[:, None]
    return keys.masked_fill(is_later[..., None, None], 0.0).sum(1, dtype=torch.float32)


def _by_head(summary: torch.Tensor, view: DecodeView) -> torch.Tensor:
    """[R, Hkv, D, M] of the pages of each row."""
    return summary[view.pages].float().permute(0, 2, 3, 1)
