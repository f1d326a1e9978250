"""Recall against a softmax written out, and the clock against a method that sleeps."""

import time
from typing import Any

import pytest
import torch

from sparse_methods import get_sparse_method
from sparse_methods.evaluation.probes import RecallProbe, SelectionClock
from sparse_methods.kernels import reference
from sparse_methods.kernels.operation import (
    AttentionInputs,
    BlockLists,
    LayerGeometry,
    PageTable,
    QueryTiles,
    Tile,
)
from sparse_methods.methods.streaming_v1 import Streaming
from sparse_methods.views import Phase

BLOCK, HEADS, DIM = 8, 2, 16


def inputs(lists):
    """Three tiles of a prompt and one decoded row behind it; one KV head for two query heads."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(25, HEADS, DIM, generator=generator)
    keys, values = (torch.randn(4, BLOCK, 1, DIM, generator=generator) for _ in range(2))
    tiles = tuple(Tile(8 * i, 8, 8 * i, 0, is_decode=False) for i in range(3))
    tiles += (Tile(24, 1, 24, 0, is_decode=True),)
    return AttentionInputs(
        query=query,
        keys=keys,
        values=values,
        page_table=PageTable(torch.arange(4)[None]),
        tiles=QueryTiles(tiles, BLOCK, torch.device("cpu")),
        geometry=LayerGeometry(HEADS, 1, DIM, DIM, DIM**-0.5),
        lists=lists,
    )


def kept_mass(given, blocks_of_tile):
    """[25, HEADS] softmax mass on the blocks of each row's tile."""
    scores = torch.einsum("thd,kd->thk", given.query, given.keys.flatten(0, 1)[:, 0]) * DIM**-0.5
    position = torch.arange(25)
    scores = scores.masked_fill(torch.arange(32) > position[:, None, None], float("-inf"))
    mass = scores.softmax(-1).unflatten(-1, (4, BLOCK)).sum(-1)
    return torch.stack(
        [mass[row, :, blocks_of_tile[min(row // 8, 3)]].sum(-1) for row in range(25)]
    )


def test_recall_is_the_softmax_mass_of_the_blocks_read():
    blocks = [[0], [1], [0, 2], [1, 3]]
    indices = torch.tensor([b + [0] * (2 - len(b)) for b in blocks], dtype=torch.int32)[:, None]
    counts = torch.tensor([len(b) for b in blocks], dtype=torch.int32)[:, None]
    given = inputs(BlockLists(indices, counts))
    probe = RecallProbe(reference.attend, num_layers=1, stride=1)
    probe(given)
    assert probe.recall(Phase.PREFILL) is None  # it was not active
    probe.is_active = True
    outputs = probe(given)
    assert torch.equal(outputs.output, reference.attend(given).output)
    mass = kept_mass(given, blocks)
    assert probe.recall(Phase.PREFILL) == pytest.approx(float(mass[:24].mean()), abs=1e-6)
    assert probe.recall(Phase.DECODE) == pytest.approx(float(mass[24].mean()), abs=1e-6)
    assert float(mass[:24].mean()) < 0.95
    probe.reset()
    assert probe.recall(Phase.PREFILL) is None


def test_dense_recalls_everything():
    probe = RecallProbe(reference.attend, num_layers=1, stride=1)
    probe.is_active = True
    probe(inputs(None))
    assert probe.recall(Phase.PREFILL) == probe.recall(Phase.DECODE) == 1.0


def test_every_layer_has_its_turn_and_only_every_fourth_costs():
    calls = []

    def attend(given):
        calls.append(given)
        return reference.attend(given)

    probe = RecallProbe(attend, num_layers=8, stride=4)
    probe.is_active = True
    extra = []
    for step in range(4):
        for layer in range(8):
            before = len(calls)
            probe(inputs(None))
            if len(calls) - before == 2:
                extra.append((step, layer))
    assert len(extra) == 8
    assert {layer for _, layer in extra} == set(range(8))


class Sleepy(Streaming):
    def select_decode(self, view):
        time.sleep(0.02)
        return view


def test_the_clock_times_decisions_by_phase():
    clock = SelectionClock("cpu")
    timed: Any = clock.timed(Sleepy({"sink_blocks": 2}))
    assert clock.seconds(Phase.DECODE) is None
    assert timed.select_decode("view") == "view"
    assert timed.select_decode("view") == "view"
    assert 0.04 <= (clock.seconds(Phase.DECODE) or 0) < 30
    assert clock.seconds(Phase.PREFILL) is None
    assert timed.knobs.sink_blocks == 2
    assert timed.registered_name == "streaming"
    clock.reset()
    assert clock.seconds(Phase.DECODE) is None


def test_a_timed_method_still_does_not_override_what_it_did_not():
    timed = SelectionClock("cpu").timed(get_sparse_method("dense")())
    dense = type(get_sparse_method("dense")())
    assert type(timed).select_prefill is dense.select_prefill
    assert type(timed).score_pages is dense.score_pages
