"""Schedulers without a model, and steps that are made up for them."""

import torch

from service.engine.kv_cache import PageAllocator
from service.engine.prefix import PrefixKeys
from service.engine.scheduler import Limits, Scheduler
from service.engine.sequence import SamplingParams, Sequence
from sparse_methods import get_sparse_method

BLOCK = 8


def sequence(num_prompt, num_output=0):
    return Sequence(
        request_id="r",
        prompt_ids=[5] * num_prompt,
        method=get_sparse_method("dense")(),
        sampling=SamplingParams(),
        generator=torch.Generator(),
        output_ids=[6] * num_output,
    )


def prompted(prompt_ids, **sampling):
    one = sequence(0)
    one.prompt_ids = list(prompt_ids)
    one.prefix = PrefixKeys(one.prompt_ids, BLOCK, one.method)
    one.sampling = SamplingParams(**sampling)
    return one


def make(num_pages=100, max_step_tokens=64, max_running=4):
    pages = PageAllocator(num_pages, BLOCK)
    return Scheduler(Limits(max_step_tokens, max_running, BLOCK), pages), pages


def limited(max_prefill_s, num_pages=100, max_step_tokens=64):
    """A scheduler that believes in 1000 tokens of prompts per second."""
    pages = PageAllocator(num_pages, BLOCK)
    scheduler = Scheduler(Limits(max_step_tokens, 8, BLOCK, max_prefill_s), pages)
    scheduler.prompts.note_pace(500, 0.5)
    return scheduler, pages


def of(sequence, chunks):
    return sum(c.num_tokens for c in chunks if c.sequence is sequence)


def advance(chunks, *, generate=True):
    for chunk in chunks:
        chunk.sequence.num_computed_tokens = chunk.stop
        if generate and chunk.sequence.num_uncomputed_tokens == 0:
            chunk.sequence.output_ids.append(7)
