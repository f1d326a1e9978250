"""A trial run of the packed path: several prompts, chunked and interleaved, all logits kept."""

import torch

from service.engine.kv_cache import PageAllocator
from service.engine.model_runner import ModelRunner
from service.engine.scheduler import Chunk
from service.engine.sequence import SamplingParams, Sequence
from sparse_methods import get_sparse_method


def packed_logits(
    runner: ModelRunner, prompts: list[list[int]], max_chunk_tokens: int
) -> list[torch.Tensor]:
    """Run prompts as one mixed batch under ``dense``; the last tokens of each are decoded.

    Every prompt takes two prefill chunks, then one token per step, so that a step mixes both.

    Args:
        runner: Its cache must not be in use.
        prompts: Token ids.
        max_chunk_tokens: Most tokens of one chunk.

    Returns:
        [len, V] logits of each prompt.
    """
    allocator = PageAllocator(runner.num_pages, runner.block_size)
    sequences = [_sequence(prompt) for prompt in prompts]
    logits: list[list[torch.Tensor]] = [[] for _ in prompts]
    while True:
        chunks = [_next_chunk(s, max_chunk_tokens) for s in sequences if s.num_uncomputed_tokens]
        if not chunks:
            return [torch.cat(rows) for rows in logits]
        for chunk in chunks:
            if not allocator.try_reserve(chunk.sequence, chunk.num_tokens):
                raise MemoryError("the KV cache is too small for a trial run")
        rows = runner.run_all_logits(chunks).split([chunk.num_tokens for chunk in chunks])
        # Serving needs the last rows alone and computes no more than it must: so they stand here.
        last_rows = runner.run_last_logits(chunks)
        for chunk, part, last_row in zip(chunks, rows, last_rows, strict=True):
            logits[sequences.index(chunk.sequence)] += [part[:-1], last_row[None]]
            chunk.sequence.num_computed_tokens = chunk.stop


_MAX_DECODED = 16  # tokens of a prompt that are computed one by one, a step each


def _sequence(prompt: list[int]) -> Sequence:
    half = max(1, len(prompt) // 2, len(prompt) - _MAX_DECODED)
    return Sequence(
        request_id="trial",
        prompt_ids=prompt[:half],
        method=get_sparse_method("dense")(),
        sampling=SamplingParams(),
        generator=torch.Generator(),
        output_ids=prompt[half:],
    )


def _next_chunk(sequence: Sequence, max_chunk_tokens: int) -> Chunk:
    start = sequence.num_computed_tokens
    num_tokens = 1
    if start < sequence.num_prompt_tokens:
        remaining = sequence.num_prompt_tokens - start
        num_tokens = min(-(-sequence.num_prompt_tokens // 2), remaining, max_chunk_tokens)
    return Chunk(sequence, start, num_tokens)
