"""Packed, chunked and paged logits equal those of each request alone in plain transformers."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from service.engine.model_runner import ModelRunner
from service.engine.scheduler import Chunk
from service.engine.sequence import SamplingParams, Sequence
from service.models.bridge import NAME
from service.models.discovery import discover
from service.models.hugging_face import set_attention
from service.models.rope import pin_rope
from sparse_methods import get_sparse_method
from tests.service.models import tiny

PROMPT_LENS = (13, 29, 40)
NUM_DECODES = 4
NUM_PAGES = 40
TOLERANCE = 1e-4

# Tokens of each request in each step: late arrivals, uneven chunks, decodes beside prefills, a
# step of prefill only, one of decodes only.
STEPS = (
    (13, 5, 0),
    (1, 0, 17),
    (1, 19, 8),
    (1, 5, 0),
    (0, 1, 15),
    (1, 1, 1),
    (0, 1, 1),
    (0, 1, 2),
)


def test_the_steps_compute_every_token_once():
    totals = tuple(map(sum, zip(*STEPS, strict=True)))
    assert totals == tuple(length + NUM_DECODES for length in PROMPT_LENS)


def request(seed, prompt_len):
    ids = tiny.tokens(prompt_len + NUM_DECODES, seed)
    return Sequence(
        request_id=str(seed),
        prompt_ids=ids[:prompt_len],
        method=get_sparse_method("dense")(),
        sampling=SamplingParams(),
        generator=torch.Generator(),
        output_ids=ids[prompt_len:],
    )


def deal_pages(sequences, block_size):
    """Random pages for everyone, so that neighbours in a request are strangers in the cache."""
    pages = torch.randperm(NUM_PAGES, generator=torch.Generator().manual_seed(1)).tolist()
    for sequence in sequences:
        needed = -(-sequence.num_tokens // block_size)
        sequence.pages = [pages.pop() for _ in range(needed)]


def largest_error(model, block_size, change=lambda geometry: geometry):
    """Largest deviation of any logit of any request, as a share of the largest logit."""
    model.set_attn_implementation("eager")
    sequences = [request(seed, length) for seed, length in enumerate(PROMPT_LENS)]
    expected = [tiny.plain_logits(model, s.tokens(0, s.num_tokens)) for s in sequences]
    layers = [(layer.module, change(layer.geometry)) for layer in discover(model)]
    set_attention(model, NAME)
    runner = ModelRunner(model, layers, num_pages=NUM_PAGES, block_size=block_size, num_slots=3)
    deal_pages(sequences, block_size)
    errors = []
    for step in STEPS:
        pairs = zip(sequences, step, strict=True)
        chunks = [Chunk(s, s.num_computed_tokens, n) for s, n in pairs if n]
        rows = runner.run_all_logits(chunks).split([chunk.num_tokens for chunk in chunks])
        for chunk, actual in zip(chunks, rows, strict=True):
            alone = expected[sequences.index(chunk.sequence)]
            difference = (actual - alone[chunk.start : chunk.stop]).abs().max()
            errors.append(float(difference / alone.abs().max()))
            chunk.sequence.num_computed_tokens = chunk.stop
    return max(errors)


@pytest.mark.parametrize("block_size", [8, 16])
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_a_mixed_batch_gives_each_request_the_logits_it_has_alone(name, block_size):
    assert largest_error(tiny.build(name), block_size) < TOLERANCE


def test_longrope_with_prompts_on_both_sides_of_the_original_length():
    parameters = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0 + 0.5 * i for i in range(8)],
        "original_max_position_embeddings": 32,
    }
    model = tiny.build("phi3", rope_parameters=parameters, original_max_position_embeddings=32)
    assert pin_rope(model, 256)
    assert largest_error(model, 8) < TOLERANCE


CONTROLS: dict[str, tuple[str, dict[str, Any], float]] = {
    "a dropped window": ("mistral", {"window": 0}, 0.1),
    "a window off by one": ("mistral", {"window": tiny.WINDOW - 1}, 0.1),
    "a dropped soft cap": ("gemma2", {"softcap": 0.0}, TOLERANCE),  # a cap of 50 barely bends
    "dropped sinks": ("gpt_oss", {"has_sinks": False}, 0.1),
    "another scale": ("llama", {"scale": 0.3}, 0.1),
    "a chunk that is not there": ("llama", {"chunk": 8}, 0.1),
}


@pytest.mark.parametrize("control", CONTROLS)
def test_the_comparison_would_notice(control):
    name, change, least = CONTROLS[control]
    assert largest_error(tiny.build(name), 8, lambda g: replace(g, **change)) > least
