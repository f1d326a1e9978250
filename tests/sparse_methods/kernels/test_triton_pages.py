"""The kernels of decode rows against the eager rule of ``quest``."""

from dataclasses import replace

import pytest
import torch

from sparse_methods.kernels import selection, triton_pages
from sparse_methods.methods.quest_v1 import Quest
from tests.sparse_methods import paged
from tests.sparse_methods.kernels.cases import DEVICE

HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16  # as the interpreter allows
KV_LENS = [1, 16, 17, 100, 333, 400]
SHAPES = [(2, 2, 16), (3, 1, 64), (8, 2, 96), (8, 1, 128)]  # heads, KV heads, head dim


@pytest.fixture(autouse=True)
def _eager(monkeypatch):
    """What is compared with, on any device."""
    monkeypatch.setattr(selection, "has_kernels", lambda tensor: False)


def rows(kv_lens=KV_LENS, shape=(4, 2, 16), dtype=torch.float32, page_size=16):
    heads, kv_heads, head_dim = shape
    generator = torch.Generator().manual_seed(0)
    keys = 2 * torch.randn(25, 1, kv_heads, head_dim, generator=generator).expand(-1, 16, -1, -1)
    keys = keys.flatten(0, 1) + 0.3 * torch.randn(400, kv_heads, head_dim, generator=generator)
    query = torch.randn(400, heads, head_dim, generator=generator)
    query = query[torch.tensor(kv_lens) - 1].to(dtype)
    view = paged.decode_view(query, keys.to(dtype), kv_lens, page_size=page_size)
    return paged.on(view, DEVICE)


def listed(chosen):
    return [
        [indices[:count] for indices, count in zip(*row, strict=True)]
        for row in zip(chosen.indices.tolist(), chosen.counts.tolist(), strict=True)
    ]


def given(view, budget=6, top_p=0.7):
    chosen = triton_pages.select_by_bounds(view, view.summaries, budget, top_p)
    assert chosen.indices.dtype == chosen.counts.dtype == torch.int32
    return listed(chosen)


def expected(view, budget=6, top_p=0.7):
    chosen = Quest({"budget_pages": budget, "top_p": top_p}).select_decode(view)
    return [[sorted(pages) for pages in row] for row in listed(chosen)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("top_p", [None, 0.7])
def test_pages_are_those_of_the_rule_ascending(shape, top_p):
    view = rows(shape=shape)
    assert given(view, top_p=top_p) == expected(view, top_p=top_p)


@pytest.mark.parametrize("budget", [2, 3, 9, 100])
@pytest.mark.parametrize("top_p", [0.1, 0.95])
def test_budget_and_share_both_bound_a_list(budget, top_p):
    view = rows()
    assert given(view, budget, top_p) == expected(view, budget, top_p)


@pytest.mark.parametrize("page_size", [16, 24, 128])
def test_pages_may_have_any_size(page_size):
    view = rows(page_size=page_size, dtype=HALF)
    assert given(view) == expected(view)


def test_equal_pages_are_taken_from_the_left():
    view = rows([400])
    for tensor in vars(view.summaries).values():
        tensor.fill_(1.0)
    assert given(view, 5, None) == [[[0, 1, 2, 3, 24]] * 2]


def test_a_row_reads_alone_what_it_reads_in_a_batch():
    together = given(rows())
    assert [given(rows([length]))[0] for length in KV_LENS] == together


def test_keys_of_later_rows_in_the_own_page_do_not_count():
    view = rows([333, 400])
    before = given(view, 12, 0.8)
    own = view.pages[torch.arange(2, device=DEVICE), view.own_pages.long()]
    view.summaries.total[own] += 30.0
    assert given(view, 12, 0.8) == before


def test_entries_beyond_a_row_and_unwritten_slots_are_not_read():
    view = rows([17, 400])
    before = given(view)
    written = torch.zeros(view.keys.shape[:2], dtype=torch.bool, device=DEVICE)
    for row, length in enumerate((17, 400)):
        for position in range(length):
            written[view.pages[row, position // 16], position % 16] = True
    view.keys[~written] = float("nan")
    for tensor in vars(view.summaries).values():
        tensor[~written.any(1)] = float("nan")
    table = view.pages.clone()
    table[0, 2:] = written.any(1).logical_not().nonzero()[0]
    assert given(replace(view, pages=table)) == before


def test_the_whole_list_names_pages_of_the_table():
    view = rows()
    chosen = triton_pages.select_by_bounds(view, view.summaries, 6, 0.7)
    assert chosen.indices.shape == (6, 2, 6)
    assert chosen.indices.min() >= 0
    assert chosen.indices.max() < view.max_pages


def test_no_rows_choose_nothing():
    view = rows([400])
    nothing = replace(view, query=view.query[:0], pages=view.pages[:0], kv_lens=view.kv_lens[:0])
    assert given(nothing) == []


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
def test_a_captured_call_follows_lengths_as_they_grow():
    view = rows([333, 400])
    triton_pages.select_by_bounds(view, view.summaries, 6, 0.7)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chosen = triton_pages.select_by_bounds(view, view.summaries, 6, 0.7)
    for lengths in ([333, 400], [20, 128], [1, 390]):
        view.kv_lens.copy_(torch.tensor(lengths))
        graph.replay()
        assert listed(chosen) == given(view)
