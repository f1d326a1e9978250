"""What other ranks know of sequences is what the leader knows of them."""

import gc
import pickle

import pytest
import torch

from service.engine.scheduler import Chunk
from service.engine.sequence import SamplingParams, Sequence
from service.engine.step_messages import StepReader, StepWriter
from sparse_methods import get_sparse_method

SHARED = (
    "request_id",
    "prompt_ids",
    "method",
    "output_ids",
    "num_cached_tokens",
    "num_computed_tokens",
    "num_pending_tokens",
    "pages",
    "slot",
    "num_preemptions",
)


def sequence_of(name: str, num_prompt: int = 40) -> Sequence:
    return Sequence(
        request_id=name,
        prompt_ids=list(range(num_prompt)),
        method=get_sparse_method("block_topk")({"min_blocks": 3}),
        sampling=SamplingParams(prompt_logprobs=2),
        generator=torch.Generator(),
        slot=3,
    )


class Wire:
    """A leader and a follower with a pipe between them.

    Attributes:
        num_bytes: Of the last message.
    """

    def __init__(self) -> None:
        self.writer, self.reader = StepWriter(), StepReader()
        self.num_bytes = 0

    def send(self, *chunks: Chunk) -> list[Chunk]:
        content = pickle.dumps(self.writer.write(chunks))
        self.num_bytes = len(content)
        copies = self.reader.read(pickle.loads(content))  # noqa: S301 - it is our own
        for chunk, copy in zip(chunks, copies, strict=True):
            assert (chunk.start, chunk.num_tokens) == (copy.start, copy.num_tokens)
            assert (chunk.completes, chunk.is_first) == (copy.completes, copy.is_first)
            for name in SHARED:
                assert getattr(copy.sequence, name) == getattr(chunk.sequence, name), name
            assert copy.sequence.sampling.prompt_logprobs == 2
            assert copy.sequence.tokens(chunk.start, chunk.stop) == chunk.sequence.tokens(
                chunk.start, chunk.stop
            )
        return copies


@pytest.fixture
def wire():
    return Wire()


def test_a_sequence_is_followed_from_prompt_to_tokens(wire):
    sequence = sequence_of("a")
    sequence.pages = [5, 6]
    [first] = wire.send(Chunk(sequence, 0, 32))
    sequence.num_computed_tokens = 32
    sequence.pages.append(9)
    [second] = wire.send(Chunk(sequence, 32, 8))
    assert second.sequence is first.sequence
    sequence.num_computed_tokens = 40
    sequence.num_pending_tokens = 1  # the engine runs ahead: nobody but the device knows it
    [third] = wire.send(Chunk(sequence, 40, 1))
    assert third.sequence.token(40) == ~3
    sequence.output_ids += [77]
    sequence.num_computed_tokens = 41
    [fourth] = wire.send(Chunk(sequence, 41, 1))
    assert fourth.sequence.output_ids == [77]


def test_who_gave_way_comes_back_with_other_pages(wire):
    sequence = sequence_of("a")
    sequence.pages = [5, 6, 7]
    sequence.output_ids = [1, 2, 3]
    wire.send(Chunk(sequence, 0, 40))
    sequence.pages, sequence.slot, sequence.num_preemptions = [6], 1, 1
    sequence.num_cached_tokens = sequence.num_computed_tokens = 0
    wire.send(Chunk(sequence, 0, 16))
    sequence.pages = [6, 5]
    sequence.num_computed_tokens = 16
    wire.send(Chunk(sequence, 16, 16))


def test_who_takes_over_pages_starts_behind_them(wire):
    sequence = sequence_of("a")
    sequence.pages = [5, 6]
    sequence.num_cached_tokens = sequence.num_computed_tokens = 16
    [copy] = wire.send(Chunk(sequence, 16, 16))
    assert copy.is_first


def test_a_step_of_long_prompts_is_a_short_message(wire):
    sequence = sequence_of("a", 100_000)
    sequence.pages = list(range(800))
    wire.send(Chunk(sequence, 0, 100_000))
    sequence.num_computed_tokens = 100_000
    sequence.output_ids = [4]
    wire.send(Chunk(sequence, 100_000, 1))
    assert wire.num_bytes < 400


def test_what_the_leader_forgets_everybody_forgets(wire):
    first, second = sequence_of("a"), sequence_of("b")
    wire.send(Chunk(first, 0, 8), Chunk(second, 0, 8))
    del first
    gc.collect()
    wire.send(Chunk(second, 8, 8))
    assert len(wire.reader._copies) == len(wire.writer._known) == 1
    third = sequence_of("c")
    [copy] = wire.send(Chunk(third, 0, 8))
    assert copy.sequence.request_id == "c"
