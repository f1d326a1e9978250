"""What chunks, batches, padded steps and starting over must not change, for every method."""

import pytest
import torch

from service.engine.kv_cache import PageAllocator
from service.engine.model_runner import ModelRunner
from service.engine.scheduler import Chunk
from service.engine.sequence import SamplingParams, Sequence
from service.models.loading import load_model
from sparse_methods.method import SparseAttentionMethod
from sparse_methods.statistics import RequestStatistics
from tests.service.engine.stepping import BLOCK, IDS, method_of

LENGTHS = (1, BLOCK - 1, BLOCK, BLOCK + 1, 10 * BLOCK, 12 * BLOCK + 2)
NUM_GENERATED = 20
Outcome = tuple[dict[str, RequestStatistics], dict[tuple[str, int], torch.Tensor]]


class Played:
    """Requests of one method whose generated tokens are given, computed step by step.

    Attributes:
        logits: Of each step that gave a next token, by request and tokens so far.
    """

    def __init__(
        self,
        directory,
        method: SparseAttentionMethod,
        lengths: tuple[int, ...] = LENGTHS,
        num_pages: int = 64,
    ) -> None:
        loaded = load_model(directory, "cpu", "float32")
        layers = [(layer.module, layer.geometry) for layer in loaded.layers]
        sizes = {"num_pages": num_pages, "block_size": BLOCK, "num_slots": len(lengths)}
        self.runner = ModelRunner(loaded.model, layers, **sizes)
        self.allocator = PageAllocator(num_pages, BLOCK)
        self.logits: dict[tuple[str, int], torch.Tensor] = {}
        self.generated: dict[str, list[int]] = {}
        self.sequences = [self._sequence(*numbered, method) for numbered in enumerate(lengths)]

    def _sequence(self, slot: int, length: int, method: SparseAttentionMethod) -> Sequence:
        generator = torch.Generator().manual_seed(length)
        tokens = torch.randint(8, 4000, (length + NUM_GENERATED,), generator=generator).tolist()
        self.generated[str(length)] = tokens[length:]
        return Sequence(
            request_id=str(length),
            prompt_ids=tokens[:length],
            method=method,
            sampling=SamplingParams(),
            generator=torch.Generator(),
            slot=slot,
        )

    def step(self, size: int, *, padded: bool = False) -> None:
        """Compute up to ``size`` tokens of each request that has any left."""
        chunks = [
            Chunk(s, s.num_computed_tokens, min(size, s.num_uncomputed_tokens))
            for s in self.sequences
            if s.num_uncomputed_tokens
        ]
        for chunk in chunks:
            assert self.allocator.try_reserve(chunk.sequence, chunk.num_tokens)
        completed = [chunk.sequence for chunk in chunks]
        if padded:
            rows = self.runner.run_padded_step(chunks)
        else:
            rows, completed = self.runner.run(chunks)
        for row, sequence in zip(rows, completed, strict=False):
            self.logits[sequence.request_id, sequence.num_tokens] = row.clone()
        for chunk in chunks:
            chunk.sequence.num_computed_tokens = chunk.stop

    def whole(self, size: int = 4096, *, padded: bool = False) -> Outcome:
        """Prompts in chunks of ``size`` tokens, then a token of each at a time."""
        while any(sequence.num_uncomputed_tokens for sequence in self.sequences):
            self.step(size)
        for index in range(NUM_GENERATED):
            for sequence in self.sequences:
                sequence.output_ids.append(self.generated[sequence.request_id][index])
            self.step(1, padded=padded)
        return self.outcome()

    def started_over(self) -> Outcome:
        """Prompts and generated tokens together, as after a preemption."""
        for sequence in self.sequences:
            sequence.output_ids = self.generated[sequence.request_id]
        self.step(4096)
        return self.outcome()

    def outcome(self) -> Outcome:
        return {s.request_id: self.runner.statistics(s) for s in self.sequences}, self.logits


def assert_alike(given: Outcome, expected: Outcome) -> None:
    for request_id, statistics in given[0].items():
        assert statistics == expected[0][request_id], request_id
    assert given[1]
    for key in given[1].keys() & expected[1].keys():
        assert torch.allclose(given[1][key], expected[1][key], atol=1e-3), key


@pytest.mark.parametrize("method_id", IDS)
def test_the_way_a_request_is_computed_changes_nothing(tiny_model_dir, method_id):
    method = method_of(method_id)

    def played(**settings) -> Played:
        return Played(tiny_model_dir, method, **settings)

    expected = played().whole()
    assert_alike(played().whole(2 * BLOCK), expected)
    assert_alike(played().whole(padded=True), expected)
    assert_alike(played().started_over(), expected)
    longest = LENGTHS[-1:]
    num_pages = -(-(longest[0] + NUM_GENERATED) // BLOCK)  # fewer than a padded step has room for
    assert_alike(played(lengths=longest, num_pages=num_pages).whole(padded=True), expected)
    sparsity = [expected[0][str(longest[0])].phase(phase).sparsity for phase in method.phases]
    assert all(share > 0 for share in sparsity), "nothing was left out"
