from typing import Any

import pytest
import torch

from sparse_methods import DecodeView, InvalidKnobsError, PrefillView
from sparse_methods.methods.streaming_v1 import Streaming
from tests.sparse_methods import paged

SHAPES = [(1, 1), (1, 8), (3, 2), (4, 64)]


def prefill_view(num_blocks: int, num_kv_heads: int = 2) -> PrefillView:
    keys = torch.zeros(num_blocks * 16, num_kv_heads, 4)
    return paged.prefill_view(keys.repeat(1, 2, 1), keys, block_size=16)


def decode_view(kv_lens: list[int], page_size: int = 16) -> DecodeView:
    query = torch.zeros(len(kv_lens), 4, 4)
    return paged.decode_view(query, torch.zeros(max(kv_lens), 2, 4), kv_lens, page_size=page_size)


def expected(own: int, sink: int, window: int) -> list[int]:
    """The rule in words: the first blocks and the most recent ones."""
    return [b for b in range(own + 1) if b < sink or b > own - window]


def listed(selection: Any, row: int, head: int = 0) -> list[int]:
    blocks: list[int] = selection.indices[row, head, : selection.counts[row, head]].tolist()
    return blocks


@pytest.mark.parametrize(("sink", "window"), SHAPES)
def test_each_tile_reads_the_first_blocks_and_the_most_recent_ones(sink, window):
    method = Streaming({"sink_blocks": sink, "window_blocks": window})
    selection = method.select_prefill(prefill_view(80))
    assert selection.indices.shape == (80, 2, sink + window)
    assert selection.indices.dtype == selection.counts.dtype == torch.int32
    for own in range(80):
        assert listed(selection, own, 0) == expected(own, sink, window)
        assert listed(selection, own, 1) == expected(own, sink, window)


@pytest.mark.parametrize(("sink", "window"), SHAPES)
def test_decoding_reads_the_pages_that_a_tile_at_its_place_would_read(sink, window):
    method = Streaming({"sink_blocks": sink, "window_blocks": window})
    kv_lens = [1, 15, 16, 17, 32, 33, 160, 161, 8000]
    selection = method.select_decode(decode_view(kv_lens))
    for row, kv_len in enumerate(kv_lens):
        assert listed(selection, row) == expected((kv_len - 1) // 16, sink, window)


def test_capacity_does_not_depend_on_lengths():
    method = Streaming()
    short, long = method.select_decode(decode_view([3])), method.select_decode(decode_view([9000]))
    assert short.indices.shape == long.indices.shape == (1, 2, 5)


def test_by_default_a_prompt_of_ten_thousand_tokens_reads_an_eighth():
    counts = Streaming().select_prefill(prefill_view(79)).counts[:, 0]
    density = int(counts.sum()) / sum(own + 1 for own in range(79))
    assert 0.1 < density < 0.15


@pytest.mark.parametrize(
    ("num_queries", "num_keys"),
    [(1, 1), (1, 900), (128, 128), (640, 640), (1000, 1000), (130, 230), (37, 700), (256, 1024)],
)
def test_the_mask_keeps_exactly_the_listed_blocks_below_the_diagonal(num_queries, num_keys):
    method = Streaming({"sink_blocks": 1, "window_blocks": 2})
    mask, stats = method.calculate_sparsity(torch.randn(2, 3, num_queries, num_keys))
    assert mask.shape == (2, 3, num_queries, num_keys)
    offset = num_keys - num_queries
    oracle = torch.zeros(num_queries, num_keys, dtype=torch.bool)
    for row in range(num_queries):
        for block in expected((offset + row) // 128, 1, 2):
            oracle[row, block * 128 : min((block + 1) * 128, offset + row + 1)] = True
    assert (mask == oracle).all()
    owns = range(offset // 128, (num_keys - 1) // 128 + 1)
    heads = 2 * 3
    total = heads * sum(o + 1 for o in owns)
    kept = heads * sum(len(expected(o, 1, 2)) for o in owns)
    assert stats == {
        "sparsity": 1 - kept / total,
        "total_blocks": total,
        "sparse_blocks": total - kept,
        "phase": "decode" if num_queries == 1 else "prefill",
        "sample_length": num_keys,
    }


def test_cutting_a_prompt_into_chunks_does_not_change_its_mask():
    method, scores = Streaming({"window_blocks": 2}), torch.randn(1, 1, 1000, 1000)
    whole, _ = method.calculate_sparsity(scores)
    for begin, end in [(0, 256), (256, 700), (700, 701), (701, 1000)]:
        part, _ = method.calculate_sparsity(scores[:, :, begin:end, :end])
        assert torch.equal(part, whole[:, :, begin:end, :end])


def test_masked_scores_carry_no_weight():
    method, scores = Streaming({"window_blocks": 1}), torch.randn(1, 1, 512, 512)
    mask, stats = method.calculate_sparsity(scores)
    sparse = method.apply_sparsity(scores)
    assert 0 < stats["sparse_blocks"] < stats["total_blocks"]
    assert torch.equal(sparse, method.apply_sparsity(scores, mask))
    assert torch.equal(sparse[mask], scores[mask])
    assert (sparse.softmax(-1)[~mask] == 0).all()


def test_more_queries_than_keys_are_refused():
    with pytest.raises(ValueError, match="got 5 queries, 3 keys"):
        Streaming().calculate_sparsity(torch.randn(1, 1, 5, 3))


@pytest.mark.parametrize(
    ("knob", "value"),
    [("sink_blocks", 0), ("sink_blocks", 65), ("window_blocks", 0), ("window_blocks", 4097)],
)
def test_knobs_have_bounds(knob, value):
    with pytest.raises(InvalidKnobsError, match=knob):
        Streaming({knob: value})
