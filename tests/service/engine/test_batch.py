"""Chunks become tensors: tiles are cut at absolute positions, whatever the chunking."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from service.engine.batch import build_batch, cut_tiles
from service.engine.scheduler import Chunk
from service.engine.sequence import SamplingParams, Sequence
from service.models.selection import DecodeGroup, PrefillGroup
from sparse_methods import get_sparse_method

BLOCK = 16


def sequence(num_prompt, num_output, method="dense", knobs=None):
    total = num_prompt + num_output
    one = Sequence(
        request_id="r",
        prompt_ids=list(range(num_prompt)),
        method=get_sparse_method(method)(knobs),
        sampling=SamplingParams(),
        generator=torch.Generator(),
        output_ids=list(range(num_prompt, total)),
        slot=0,
    )
    one.pages = [7 + page for page in range(-(-total // BLOCK))]
    return one


def spans(chunk):
    return [(t.position, t.num_rows, t.is_decode) for t in cut_tiles(chunk, 0, 0, BLOCK)]


def test_prompt_rows_share_tiles_and_generated_rows_stand_alone():
    one = sequence(20, 3)
    assert spans(Chunk(one, 0, 23)) == [
        (0, 16, False),
        (16, 4, False),
        (20, 1, True),
        (21, 1, True),
        (22, 1, True),
    ]


@given(st.integers(1, 90), st.integers(0, 20), st.sets(st.integers(1, 5)))
def test_chunks_that_end_on_blocks_cut_the_same_tiles_as_one_chunk(num_prompt, num_output, cuts):
    one = sequence(num_prompt, num_output)
    whole = spans(Chunk(one, 0, one.num_tokens))
    inside = sorted(c * BLOCK for c in cuts if c * BLOCK < num_prompt)
    edges = [0, *inside, one.num_tokens]
    parts = []
    for start, stop in itertools.pairwise(edges):
        parts += spans(Chunk(one, start, stop - start))
    assert parts == whole


def test_rows_slots_and_last_rows_follow_the_chunks():
    first, second = sequence(20, 0), sequence(30, 2)
    second.num_computed_tokens = 31
    batch = build_batch([Chunk(first, 16, 4), Chunk(second, 31, 1)], BLOCK, torch.device("cpu"))
    assert batch.token_ids.tolist() == [16, 17, 18, 19, 31]
    assert batch.positions.tolist() == [16, 17, 18, 19, 31]
    page = 8 * BLOCK
    assert batch.attention.slot_mapping.tolist() == [page, page + 1, page + 2, page + 3, page + 15]
    assert batch.logit_rows.tolist() == [3, 4]
    assert batch.completed == [first, second]
    assert batch.attention.counter_rows.tolist() == [0, 1]


def test_a_chunk_that_does_not_reach_the_end_gets_no_token():
    batch = build_batch([Chunk(sequence(40, 0), 0, 16)], BLOCK, torch.device("cpu"))
    assert batch.completed == []
    assert batch.logit_rows.numel() == 0


def test_prompts_are_asked_one_by_one_and_rows_by_equal_method():
    knobs = {"sink_blocks": 1, "window_blocks": 2}
    chunks = [
        Chunk(sequence(40, 0, "streaming", knobs), 0, 40),
        Chunk(sequence(20, 0), 0, 20),
        Chunk(sequence(17, 1, "streaming", dict(knobs)), 0, 18),
        Chunk(sequence(50, 3, "streaming", dict(knobs)), 50, 2),
        Chunk(sequence(17, 1, "streaming", {"window_blocks": 3}), 17, 1),
    ]
    groups = build_batch(chunks, BLOCK, torch.device("cpu")).attention.groups
    prompts = [group for group in groups if isinstance(group, PrefillGroup)]
    assert [(g.tiles, g.rows) for g in prompts] == [
        (slice(0, 3), slice(0, 40)),
        (slice(5, 7), slice(60, 77)),
    ]
    assert [(g.position, g.prompt_len, len(g.pages)) for g in prompts] == [(0, 40, 3), (0, 17, 2)]
    rows = [group for group in groups if isinstance(group, DecodeGroup)]
    assert [g.tiles.tolist() for g in rows] == [[7, 8, 9], [10]]
    assert [g.rows.tolist() for g in rows] == [[77, 78, 79], [80]]
    assert rows[0].kv_lens.tolist() == [18, 51, 52]
    assert rows[0].prompt_lens.tolist() == [17, 50, 50]
    assert rows[0].pages.shape == (3, 4)


def test_a_context_below_the_break_even_runs_dense():
    knobs = {"dense_below": 18}
    chunks = [Chunk(sequence(n, 2, "streaming", knobs), 0, n + 2) for n in (16, 17, 18)]
    groups = build_batch(chunks, BLOCK, torch.device("cpu")).attention.groups
    rows = [group for group in groups if isinstance(group, DecodeGroup)]
    assert [g.kv_lens.tolist() for g in rows] == [[18, 18, 19, 19, 20]]


def test_the_threshold_of_a_prefill_tile_does_not_depend_on_the_chunk():
    knobs = {"prefill_threshold": 0.5, "decode_threshold": 0.25}
    one = sequence(40, 1, "flash_skip_softmax", knobs)
    thresholds = build_batch(
        [Chunk(one, 0, 41), Chunk(sequence(3, 0), 0, 3)], BLOCK, torch.device("cpu")
    ).attention.log_thresholds
    assert thresholds is not None
    expected = [math.log(0.5)] * 3 + [math.log(0.25), -math.inf]
    assert thresholds.tolist() == pytest.approx(expected)
