"""How the answers of several methods become one batch's lists."""

from typing import Any

import pytest
import torch

from service.models.selection import Decided, DecodeGroup, Layer, PrefillGroup, select
from sparse_methods import get_sparse_method
from sparse_methods.kernels.operation import LayerGeometry
from sparse_methods.method import SparseAttentionMethod
from sparse_methods.views import BlockSelection, PageSelection
from tests.sparse_methods import paged

HEADS, PAGE, LENGTH = 2, 16, 80  # five pages


class Fixed(SparseAttentionMethod):
    """Answers what it is told, and remembers what it saw."""

    def __init__(self, blocks, *, answers=True):
        super().__init__()
        self.blocks, self.answers = blocks, answers
        self.seen: Any = None
        self.given: PageSelection | None = None

    name = "fixed"

    def calculate_sparsity(self, attention_scores):
        raise AssertionError("no scores here")

    def apply_sparsity(self, attention_scores, sparse_mask=None):
        raise AssertionError("no scores here")

    def lists(self, count):
        row = torch.tensor(self.blocks, dtype=torch.int32)
        # Heads before rows in memory, as some tables are.
        indices = row.expand(HEADS, count, -1).contiguous().transpose(0, 1)
        counts = torch.full((HEADS, count), len(self.blocks), dtype=torch.int32).T
        return indices, counts

    def select_prefill(self, view):
        self.seen = view
        return BlockSelection(*self.lists(view.num_tiles)) if self.answers else None

    def select_decode(self, view):
        self.seen = view
        if self.given is not None:
            return self.given
        return PageSelection(*self.lists(len(view.query))) if self.answers else None


class Once(Fixed):
    """Decides alike in every layer."""

    selects_per_layer = False


def chosen(*args):
    lists = select(layer(), *args)
    assert lists is not None
    return lists


def layer(num_kv_heads=HEADS):
    keys = torch.zeros(5, PAGE, num_kv_heads, 8)
    geometry = LayerGeometry(
        max(HEADS, num_kv_heads), num_kv_heads, head_dim=8, value_dim=8, scale=1.0
    )
    summaries = paged.summarise(keys, torch.arange(5), keys.flatten(0, 1))
    return Layer(0, 1, geometry, keys, summaries, None)


def prompt(method, tiles=slice(0, 5), rows=slice(0, LENGTH)):
    return PrefillGroup(method, tiles, rows, 0, LENGTH, torch.arange(5), 0)


def rows_of(method, places, members=None):
    places = torch.tensor(places)
    lens = torch.full((len(places),), LENGTH, dtype=torch.int32)
    pages = torch.arange(5).expand(len(places), -1)
    members = None if members is None else torch.tensor(members)
    return DecodeGroup(method, places, places, lens, lens, pages, torch.zeros_like(places), members)


def listed(lists):
    return [
        [None if count < 0 else indices[:count] for indices, count in zip(*row, strict=True)]
        for row in zip(lists.indices.tolist(), lists.counts.tolist(), strict=True)
    ]


def both(blocks):
    return [blocks] * HEADS


def test_an_answer_for_every_tile_is_the_list():
    lists = chosen(torch.zeros(LENGTH, HEADS, 8), [prompt(Fixed([0, 2]))], 5)
    assert listed(lists) == [both([0, 2])] * 5
    assert lists.indices.is_contiguous()
    assert lists.counts.is_contiguous()


def test_an_answer_is_handed_on_without_a_copy():
    method = Fixed([1])
    answer = PageSelection(
        torch.zeros(3, HEADS, 4, dtype=torch.int32), torch.ones(3, HEADS, dtype=torch.int32)
    )
    method.given = answer
    lists = chosen(torch.zeros(3, HEADS, 8), [rows_of(method, [0, 1, 2])], 3)
    assert lists.indices is answer.indices
    assert lists.counts is answer.counts


def test_rows_that_are_not_members_read_everything():
    group = rows_of(Fixed([3, 0]), [0, 1, 2], members=[True, False, True])
    lists = chosen(torch.zeros(3, HEADS, 8), [group], 3)
    assert listed(lists) == [both([3, 0]), both(None), both([3, 0])]


@pytest.mark.parametrize("order", [1, -1])
def test_each_row_gets_the_list_of_the_method_it_is_a_member_of(order):
    groups = [
        rows_of(Fixed([3]), [0, 1, 2], members=[True, False, False]),
        rows_of(Fixed([4, 0, 1]), [0, 1, 2], members=[False, False, True]),
    ]
    lists = chosen(torch.zeros(3, HEADS, 8), groups[::order], 3)
    assert listed(lists) == [both([3]), both(None), both([4, 0, 1])]


def test_prompts_and_rows_of_other_methods_lie_side_by_side():
    groups = [prompt(Fixed([0]), slice(1, 6), slice(1, 1 + LENGTH)), rows_of(Fixed([4, 2]), [0])]
    lists = chosen(torch.zeros(1 + LENGTH, HEADS, 8), groups, 6)
    assert listed(lists) == [both([4, 2])] + [both([0])] * 5


def test_some_tiles_of_a_batch_leave_the_others_alone():
    groups = [rows_of(Fixed([4]), [0, 2]), rows_of(Fixed([], answers=False), [1])]
    lists = chosen(torch.zeros(3, HEADS, 8), groups, 3)
    assert listed(lists) == [both([4]), both(None), both([4])]


def test_a_method_that_decides_alike_in_every_layer_is_asked_once_per_step():
    once, always = Once([0, 1]), Fixed([2])
    groups, decided = [rows_of(once, [0, 1]), rows_of(always, [2, 3])], Decided()
    query = torch.zeros(4, HEADS, 8)
    first = chosen(query, groups, 4, decided)
    once.seen = always.seen = None
    second = chosen(query, groups, 4, decided)
    assert once.seen is None
    assert always.seen is not None
    assert listed(first) == listed(second)
    select(layer(), query, groups, 4, Decided())
    assert once.seen is not None


@pytest.mark.parametrize("answers", [True, False])
@pytest.mark.parametrize("is_padded", [True, False])
def test_lists_of_methods_that_all_decide_alike_are_made_once_per_step(answers, is_padded):
    methods = [Once([0, 1], answers=answers), Once([2], answers=answers)]
    groups = [rows_of(methods[0], [0, 1]), rows_of(methods[1], [2])]
    if is_padded:  # as in a captured graph
        membership = [[True, True, False, False], [False, False, True, False]]
        groups = [rows_of(m, range(4), own) for m, own in zip(methods, membership, strict=True)]
    query, decided = torch.zeros(4, HEADS, 8), Decided()
    first = select(layer(), query, groups, 4, decided)
    assert (first is not None) == answers
    if first is not None:
        assert listed(first) == [both([0, 1])] * 2 + [both([2]), both(None)]
    for method in methods:
        method.seen = None
    assert select(layer(), query, groups, 4, decided) is first
    assert [method.seen for method in methods] == [None, None]


@pytest.mark.parametrize("group", ["prompt", "rows"])
def test_what_is_decided_alike_in_every_layer_has_a_list_for_each_kv_head_of_any(group):
    """As in models whose global layers have fewer KV heads than the others."""
    method = get_sparse_method("streaming")({"window_blocks": 1, "dense_below": 0})
    groups = [prompt(method)] if group == "prompt" else [rows_of(method, range(5))]
    decided, shapes = Decided(), []
    for num_kv_heads in (4, 2, 4):
        query = torch.zeros(LENGTH if group == "prompt" else 5, 4, 8)
        lists = select(layer(num_kv_heads), query, groups, 5, decided)
        assert lists is not None
        shapes.append(lists.counts.shape)
    assert shapes == [(5, 4), (5, 2), (5, 4)]


def test_nobody_answering_reads_everything():
    group = prompt(Fixed([], answers=False))
    assert select(layer(), torch.zeros(LENGTH, HEADS, 8), [group], 5) is None


def test_a_method_sees_the_rows_of_its_own():
    query = torch.arange(3.0)[:, None, None].expand(-1, HEADS, 8)
    for places in ([0, 2], [0, 1, 2]):
        method = Fixed([4])
        select(layer(), query, [rows_of(method, places)], 3)
        assert method.seen.query[:, 0, 0].tolist() == places


def test_summaries_go_to_who_asks_for_them():
    method = Fixed([4])
    select(layer(), torch.zeros(1, HEADS, 8), [rows_of(method, [0])], 1)
    assert method.seen.summaries is None
