"""The cache-writing kernel against the eager one: the same bits."""

from dataclasses import replace

import pytest
import torch

from sparse_methods.kernels import page_summary
from sparse_methods.kernels.page_summary import CacheUpdate, PageSegments, allocate_summaries
from sparse_methods.kernels.triton_cache import write_cache

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PAGE = 24  # more than the kernel moves at once
NUM_PAGES = 9
REQUESTS = [(0, 60), (23, 24), (30, 71), (47, 49), (5, 6)]  # [start, stop) of what a step writes


def copy(update):
    summaries = replace(
        update.summaries, **{k: v.clone() for k, v in vars(update.summaries).items()}
    )
    caches = {"key_cache": update.key_cache.clone(), "value_cache": update.value_cache.clone()}
    return replace(update, summaries=summaries, **caches)


def build(*, head_dim=64, value_dim=64, num_heads=2, dtype=torch.float32, cache_dtype=None):
    """What a step writes on pages that already hold something."""
    generator = torch.Generator().manual_seed(head_dim)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE, dtype)  # noqa: E731
    order = torch.randperm(NUM_PAGES, generator=generator).tolist()
    pages, lengths, continues, slots = [], [], [], []
    for start, stop in REQUESTS:
        for block in range(start // PAGE, -(-stop // PAGE)):
            first, last = max(start, block * PAGE), min(stop, (block + 1) * PAGE)
            page = order[len(pages)]
            pages.append(page)
            lengths.append(last - first)
            continues.append(first % PAGE != 0)
            slots += range(page * PAGE + first % PAGE, page * PAGE + first % PAGE + last - first)
    cache = draw(NUM_PAGES, PAGE, num_heads, head_dim).to(cache_dtype or dtype)
    summaries = allocate_summaries(cache)
    for tensor in vars(summaries).values():
        tensor.copy_(draw(NUM_PAGES, num_heads, head_dim))
    columns = (torch.tensor(column, device=DEVICE) for column in (pages, lengths, continues))
    return CacheUpdate(
        keys=draw(len(slots), num_heads, head_dim),
        values=draw(len(slots), num_heads, value_dim),
        key_cache=cache,
        value_cache=draw(NUM_PAGES, PAGE, num_heads, value_dim).to(cache_dtype or dtype),
        slot_mapping=torch.tensor(slots, device=DEVICE),
        summaries=summaries,
        segments=PageSegments(*columns),
    )


def assert_same_bits(update):
    ours, expected = copy(update), copy(update)
    write_cache(ours)
    page_summary.write_cache(expected)
    assert torch.equal(ours.key_cache, expected.key_cache)
    assert torch.equal(ours.value_cache, expected.value_cache)
    for name, tensor in vars(expected.summaries).items():
        assert torch.equal(getattr(ours.summaries, name), tensor), name
    return ours


@pytest.mark.parametrize(
    ("head_dim", "value_dim", "num_heads"), [(64, 64, 2), (96, 40, 1), (128, 128, 3), (256, 256, 1)]
)
def test_rows_and_summaries_equal_the_eager_ones(head_dim, value_dim, num_heads):
    update = build(head_dim=head_dim, value_dim=value_dim, num_heads=num_heads)
    written = assert_same_bits(update)
    assert not torch.equal(written.key_cache, update.key_cache)
    assert not torch.equal(written.summaries.total, update.summaries.total)


def test_half_precision_sums_in_float32():
    half = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
    assert_same_bits(build(dtype=half))
    assert_same_bits(build(cache_dtype=half))


def test_without_segments_the_summaries_stay():
    update = replace(build(), segments=None)
    written = assert_same_bits(update)
    assert torch.equal(written.summaries.total, update.summaries.total)


def test_rows_may_lie_with_heads_before_rows():
    update = build()
    keys, values = (
        rows.transpose(0, 1).contiguous().transpose(0, 1) for rows in (update.keys, update.values)
    )
    assert_same_bits(replace(update, keys=keys, values=values))


def test_a_step_without_rows_writes_nothing():
    update = build()
    nothing = update.slot_mapping[:0]
    segments = PageSegments(nothing, nothing, nothing.bool())
    written = copy(update)
    write_cache(
        replace(
            written,
            keys=update.keys[:0],
            values=update.values[:0],
            slot_mapping=nothing,
            segments=segments,
        )
    )
    assert torch.equal(written.key_cache, update.key_cache)
