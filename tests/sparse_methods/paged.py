"""Queries and keys laid out as the engine lays them out, for tests of methods."""

import math
from dataclasses import replace
from typing import Any, TypeVar

import torch

from sparse_methods.kernels.page_summary import PageSegments, allocate_summaries, update_summaries
from sparse_methods.views import DecodeView, PageSummaries, PrefillView

AnyView = TypeVar("AnyView", PrefillView, DecodeView)
JUNK = 1e4  # what slots hold that no key of the request was written to


def lay_out(keys: torch.Tensor, page_size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Pages [P, page_size, Hkv, D] in shuffled order with junk between, and [M] which is which."""
    num_tokens = keys.shape[0]
    num_pages = math.ceil(num_tokens / page_size)
    generator = torch.Generator().manual_seed(seed)
    pages = torch.randperm(2 * num_pages + 1, generator=generator)[:num_pages]
    cache = keys.new_full((2 * num_pages + 1, page_size, *keys.shape[1:]), JUNK)
    padded = keys.new_full((num_pages * page_size, *keys.shape[1:]), JUNK)
    padded[:num_tokens] = keys
    cache[pages] = padded.unflatten(0, (num_pages, page_size))
    return cache, pages


def summarise(cache: torch.Tensor, pages: torch.Tensor, keys: torch.Tensor) -> PageSummaries:
    """Summaries of the pages that hold ``keys`` [T, Hkv, D]; junk elsewhere."""
    summaries = allocate_summaries(cache)
    for tensor in (summaries.minimum, summaries.maximum, summaries.total):
        tensor.fill_(JUNK)
    page_size = cache.shape[1]
    starts = torch.arange(len(pages)) * page_size
    lengths = (keys.shape[0] - starts).clamp(max=page_size)
    segments = PageSegments(pages, lengths, torch.zeros(len(pages), dtype=torch.bool))
    update_summaries(summaries, keys, segments)
    return summaries


def on(view: AnyView, device: torch.device) -> AnyView:
    """The same view with every tensor on a device."""
    moved: dict[str, Any] = {}
    for name, value in vars(view).items():
        if isinstance(value, torch.Tensor):
            moved[name] = value.to(device)
        elif isinstance(value, PageSummaries):
            moved[name] = PageSummaries(**{k: v.to(device) for k, v in vars(value).items()})
    return replace(view, **moved)


def prefill_view(
    query: torch.Tensor,
    keys: torch.Tensor,
    *,
    start: int = 0,
    stop: int | None = None,
    block_size: int = 128,
    layer: int = 0,
) -> PrefillView:
    """Rows [start, stop) of a prompt with queries [T, Hq, D] and keys [T, Hkv, D].

    Later keys are not written yet, so their slots hold junk, as in a chunked prefill.
    """
    stop = query.shape[0] if stop is None else stop
    cache, pages = lay_out(keys[:stop], block_size)
    return PrefillView(
        query=query[start:stop],
        keys=cache,
        pages=pages,
        position=start,
        prompt_len=query.shape[0],
        scale=query.shape[-1] ** -0.5,
        block_size=block_size,
        layer=layer,
        num_layers=8,
        summaries=summarise(cache, pages, keys[:stop]),
    )


def decode_view(
    query: torch.Tensor,
    keys: torch.Tensor,
    kv_lens: list[int],
    *,
    page_size: int = 128,
    prompt_lens: list[int] | None = None,
    page_scores: torch.Tensor | None = None,
    layer: int = 0,
) -> DecodeView:
    """One row [R, Hq, D] per number of visible keys; each request has its own copy of the keys."""
    laid = [lay_out(keys[:length], page_size, seed) for seed, length in enumerate(kv_lens)]
    sums = [
        summarise(cache, pages, keys[:length])
        for (cache, pages), length in zip(laid, kv_lens, strict=True)
    ]
    max_pages = max(len(pages) for _, pages in laid)
    table, offset = torch.zeros(len(kv_lens), max_pages, dtype=torch.int64), 0
    for row, (cache, pages) in enumerate(laid):
        table[row, : len(pages)] = pages + offset
        offset += cache.shape[0]
    return DecodeView(
        query=query,
        keys=torch.cat([cache for cache, _ in laid]),
        pages=table,
        kv_lens=torch.tensor(kv_lens, dtype=torch.int32),
        prompt_lens=torch.tensor(prompt_lens or kv_lens, dtype=torch.int32),
        scale=query.shape[-1] ** -0.5,
        layer=layer,
        num_layers=8,
        summaries=PageSummaries(
            *(
                torch.cat([getattr(s, name) for s in sums])
                for name in ("minimum", "maximum", "total")
            )
        ),
        page_scores=page_scores,
    )
