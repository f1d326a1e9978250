"""Writing keys and values into their pages in eager PyTorch, with the summaries of the pages."""

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


@dataclass(frozen=True)
class CacheUpdate:
    """What one step writes into the cache of one layer.

    Attributes:
        keys: [T, Hkv, D] packed rows, after RoPE.
        values: [T, Hkv, Dv].
        key_cache: [P, page_size, Hkv, D].
        value_cache: [P, page_size, Hkv, Dv].
        slot_mapping: [T] int64, flat slot of each row.
        summaries: Of the key cache.
        segments: The rows by page; None leaves the summaries alone.
    """

    keys: torch.Tensor
    values: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    slot_mapping: torch.Tensor
    summaries: PageSummaries
    segments: PageSegments | None


def write_cache(update: CacheUpdate) -> None:
    """Write the rows, and fold their keys into the summaries."""
    for rows, cache in (
        (update.keys, update.key_cache),
        (update.values, update.value_cache),
    ):
        cache.flatten(0, 1).index_copy_(0, update.slot_mapping, rows.to(cache.dtype))
    if update.segments is not None:
        update_summaries(update.summaries, update.keys, update.segments)


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
