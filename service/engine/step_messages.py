"""Chunks of a step on their way to other ranks: only what those do not know yet is sent.

Every rank builds its batch from sequences. A rank that does not schedule has copies, which differ
from the leader's in what only the leader needs: times, text, random numbers, grammar.
"""

from collections.abc import Sequence as Items
from typing import NamedTuple
from weakref import ReferenceType, ref

import torch

from service.engine.scheduler import Chunk
from service.engine.sequence import SamplingParams, Sequence
from sparse_methods.method import SparseAttentionMethod


class NewSequence(NamedTuple):
    """What never changes of a sequence."""

    request_id: str
    prompt_ids: list[int]
    method: SparseAttentionMethod
    prompt_logprobs: int | None


class ChunkMessage(NamedTuple):
    """A chunk, and what has changed of its sequence since it was last sent.

    Attributes:
        number: Of the sequence, given by the leader, never given again.
        new: Set if the sequence was not sent before.
        num_kept_outputs: Output tokens that the copy keeps; ``output_ids`` follow.
        num_kept_pages: Pages that the copy keeps; ``pages`` follow.
    """

    number: int
    new: NewSequence | None
    start: int
    num_tokens: int
    slot: int | None
    num_preemptions: int
    num_cached_tokens: int
    num_computed_tokens: int
    num_pending_tokens: int
    num_kept_outputs: int
    output_ids: list[int]
    num_kept_pages: int
    pages: list[int]


class StepMessage(NamedTuple):
    """The chunks of a step.

    Attributes:
        forgotten: Numbers of sequences that the leader will not send again.
    """

    chunks: list[ChunkMessage]
    forgotten: list[int]


class _Known:
    """What the other ranks know of a sequence."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.num_outputs = 0
        self.pages: list[int] = []


class StepWriter:
    """The leader's side."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[ReferenceType[Sequence], _Known]] = {}  # by id of the object
        self._num_written = 0
        self._forgotten: list[int] = []

    def write(self, chunks: Items[Chunk]) -> StepMessage:
        """Describe a step to ranks that got all messages before this one."""
        messages = [self._chunk(chunk) for chunk in chunks]
        forgotten, self._forgotten = self._forgotten, []
        return StepMessage(messages, forgotten)

    def _chunk(self, chunk: Chunk) -> ChunkMessage:
        sequence, new = chunk.sequence, None
        entry = self._known.get(id(sequence))
        if entry is None:
            new = NewSequence(
                sequence.request_id,
                sequence.prompt_ids,
                sequence.method,
                sequence.sampling.prompt_logprobs,
            )
            known = self._remember(sequence)
        else:
            known = entry[1]
        num_kept_pages = len(known.pages)
        if sequence.pages[:num_kept_pages] != known.pages:  # it gave way, and came back elsewhere
            num_kept_pages = 0
        message = ChunkMessage(
            number=known.number,
            new=new,
            start=chunk.start,
            num_tokens=chunk.num_tokens,
            slot=sequence.slot,
            num_preemptions=sequence.num_preemptions,
            num_cached_tokens=sequence.num_cached_tokens,
            num_computed_tokens=sequence.num_computed_tokens,
            num_pending_tokens=sequence.num_pending_tokens,
            num_kept_outputs=known.num_outputs,
            output_ids=sequence.output_ids[known.num_outputs :],
            num_kept_pages=num_kept_pages,
            pages=sequence.pages[num_kept_pages:],
        )
        known.num_outputs = len(sequence.output_ids)
        known.pages[num_kept_pages:] = message.pages
        return message

    def _remember(self, sequence: Sequence) -> _Known:
        known, key = _Known(self._num_written), id(sequence)
        self._num_written += 1

        def forget(_: object) -> None:  # before the id can be another object's
            del self._known[key]
            self._forgotten.append(known.number)

        self._known[key] = (ref(sequence, forget), known)
        return known


class StepReader:
    """The other ranks' side."""

    def __init__(self) -> None:
        self._copies: dict[int, Sequence] = {}

    def read(self, message: StepMessage) -> list[Chunk]:
        """The same chunks, of copies of the sequences."""
        chunks = [self._chunk(chunk) for chunk in message.chunks]
        for number in message.forgotten:
            del self._copies[number]
        return chunks

    def _chunk(self, message: ChunkMessage) -> Chunk:
        if message.new is not None:
            self._copies[message.number] = Sequence(
                request_id=message.new.request_id,
                prompt_ids=message.new.prompt_ids,
                method=message.new.method,
                sampling=SamplingParams(prompt_logprobs=message.new.prompt_logprobs),
                generator=torch.Generator(),
            )
        copy = self._copies[message.number]
        copy.slot = message.slot
        copy.num_preemptions = message.num_preemptions
        copy.num_cached_tokens = message.num_cached_tokens
        copy.num_computed_tokens = message.num_computed_tokens
        copy.num_pending_tokens = message.num_pending_tokens
        copy.output_ids[message.num_kept_outputs :] = message.output_ids
        copy.pages[message.num_kept_pages :] = message.pages
        return Chunk(copy, message.start, message.num_tokens)
