"""Page summaries in eager PyTorch: minimum, maximum and sum of the keys, kept as pages fill."""

from dataclasses import dataclass

import torch

from sparse_methods.views import PageSummaries


@dataclass(frozen=True)
class PageSegments:
    """The packed rows of a step, cut where a page ends: each page is written by one segment.

    Attributes:
        pages: [S] int64, physical page of each segment; none comes twice.
        lengths: [S] int64, rows of each segment; they follow one another.
        continues: [S] bool, whether the page holds earlier keys of the same request.
    """

    pages: torch.Tensor
    lengths: torch.Tensor
    continues: torch.Tensor


def allocate_summaries(keys: torch.Tensor) -> PageSummaries:
    """Empty summaries of a cache of keys [P, page_size, Hkv, D]."""
    shape = (keys.shape[0], *keys.shape[2:])
    return PageSummaries(
        minimum=keys.new_zeros(shape),
        maximum=keys.new_zeros(shape),
        total=keys.new_zeros(shape, dtype=torch.float32),
    )


def update_summaries(summaries: PageSummaries, keys: torch.Tensor, segments: PageSegments) -> None:
    """Fold the keys [T, Hkv, D] that a step writes into the summaries of their pages."""
    pages, lengths = segments.pages, segments.lengths
    continues = segments.continues[:, None, None]

    def reduce(how: str) -> torch.Tensor:
        return torch.segment_reduce(keys.float(), how, lengths=lengths, axis=0, unsafe=True)

    low, high, total = reduce("min"), reduce("max"), reduce("sum")
    low = torch.where(continues, torch.minimum(summaries.minimum[pages].float(), low), low)
    high = torch.where(continues, torch.maximum(summaries.maximum[pages].float(), high), high)
    total = torch.where(continues, summaries.total[pages] + total, total)
    summaries.minimum[pages] = low.to(summaries.minimum.dtype)
    summaries.maximum[pages] = high.to(summaries.maximum.dtype)
    summaries.total[pages] = total
