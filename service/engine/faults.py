"""Whom a failed step concerns, what they are told, and who may try again.

A step fails as a whole, but mostly for the sake of somebody: a method that raises for its own
requests, or the request whose share of the step takes more memory than there is. Whoever is not
concerned computes the same tokens again in the next step.
"""

import traceback
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from service.engine.events import FaultKind
from service.engine.grouping import overrides
from service.engine.prompt_logprobs import num_prompt_rows
from service.engine.scheduler import Chunk
from service.engine.sequence import Sequence
from service.errors import GenerationError, ServiceError, TokenizerError, UnavailableError
from service.models.method_fault import MethodFaultError
from sparse_methods.method import SparseAttentionMethod

_FAILED = "The engine failed while it worked on this request."
_NO_MEMORY = "The device ran out of memory while it worked on this request; retry later."


@dataclass(frozen=True)
class Verdict:
    """What becomes of a step that raised.

    Attributes:
        error: What the failed ones are told.
        failed: Who cannot go on.
        restarted: Who goes on from the beginning, because the step left traces of them.
        lost: What the step was to write, of sequences that have ended, too.
    """

    kind: FaultKind
    error: ServiceError
    failed: list[Sequence]
    restarted: list[Sequence]
    lost: list[Chunk] = field(default_factory=list)

    def spread_to(self, sharing: list[Sequence]) -> "Verdict":
        """The same, if these have already taken over pages that the step was to write.

        They start over, unless a token is pending that was chosen from such pages: random streams
        have moved on, so that it cannot be chosen a second time.
        """
        others = [sequence for sequence in sharing if sequence not in self.failed]
        failed = [sequence for sequence in others if sequence.num_pending_tokens > 0]
        restarted = [s for s in others if s not in failed and s not in self.restarted]
        return replace(self, failed=self.failed + failed, restarted=self.restarted + restarted)


def diagnose(cause: BaseException) -> tuple[FaultKind, ServiceError]:
    """Kind of a fault, and what clients are told of it."""
    for error in _chain(cause):
        if _is_memory_fault(error):
            return FaultKind.MEMORY, UnavailableError(_NO_MEMORY)
        if isinstance(error, MethodFaultError):
            # Its own cause may still be that memory ran out.
            kind, inner = diagnose(error.__cause__) if error.__cause__ else (FaultKind.STEP, error)
            return (kind, inner) if kind is FaultKind.MEMORY else (FaultKind.METHOD, error)
        if isinstance(error, TokenizerError):
            return FaultKind.TOKENIZER, error
    is_told = isinstance(cause, ServiceError)
    return FaultKind.STEP, cause if is_told else GenerationError(_FAILED)  # type: ignore[return-value]


class Triage:
    """Notes whom the work of a step is for, and judges the step if it raises."""

    def __init__(self) -> None:
        self._repeatable: list[Chunk] = []
        self._unrepeatable: list[Chunk] = []
        self._interrupted: list[Chunk] = []
        self._has_begun = False  # to work for somebody
        self._spared_run = -2  # the last one after which nobody failed

    def begin_step(self) -> None:
        """Forget the step before."""
        self._repeatable, self._unrepeatable, self._interrupted = [], [], []
        self._has_begun = False

    @contextmanager
    def repeatable(self, chunks: list[Chunk]) -> Iterator[None]:
        """Work for these chunks, which can be done again."""
        try:
            yield
        except BaseException:
            self._has_begun = True
            self._repeatable += chunks
            raise

    @contextmanager
    def unrepeatable(self, chunks: list[Chunk]) -> Iterator[None]:
        """Work for these chunks, after which there is no way back."""
        try:
            yield
        except BaseException:
            self._has_begun = True
            self._unrepeatable += chunks
            raise

    @contextmanager
    def choosing(self, chunks: list[Chunk]) -> Iterator[None]:
        """Choosing tokens for the chunks of a step that ran.

        Random streams may have moved on, so that a token cannot be chosen a second time. Of those
        who get none, the reports on prompts are lost with the step; they can be computed again.
        """
        completing = [chunk for chunk in chunks if chunk.completes]
        reported = [chunk for chunk in chunks if num_prompt_rows(chunk) and not chunk.completes]
        try:
            with self.unrepeatable(completing):
                yield
        except BaseException:
            self._interrupted += reported
            raise

    def judge(self, cause: BaseException, live: Collection[Sequence], num_run: int) -> Verdict:
        """Decide what becomes of the sequences of the step that raised.

        Args:
            cause: What it raised.
            live: Sequences that have not ended.
            num_run: Number of the last run that was begun.
        """
        if not self._has_begun:  # before anybody was chosen to run
            return Verdict(*diagnose(cause), failed=list(live), restarted=[])
        kind, error = diagnose(cause)
        lost = [chunk.sequence for chunk in self._unrepeatable if chunk.sequence in live]
        chunks = [
            chunk
            for chunk in self._repeatable
            if chunk.sequence in live and chunk.sequence not in lost
        ]
        failed = [chunk.sequence for chunk in chunks if _is_concerned(chunk.sequence, kind, error)]
        if chunks and not failed:
            failed = self._failed_for_nobody(chunks, kind, num_run)
        restarted = [
            chunk.sequence
            for chunk in chunks
            if chunk.sequence not in failed and _leaves_traces(chunk.sequence.method)
        ]
        restarted += [chunk.sequence for chunk in self._interrupted if chunk.sequence in live]
        # Where collecting the step before fails, too, some are named twice, or under both.
        failed = list(dict.fromkeys(lost + failed))
        restarted = [one for one in dict.fromkeys(restarted) if one not in failed]
        return Verdict(kind, error, failed, restarted, self._unrepeatable)

    def _failed_for_nobody(
        self, chunks: list[Chunk], kind: FaultKind, num_run: int
    ) -> list[Sequence]:
        """Who fails if nobody is concerned in particular: nobody, unless the run before failed so.

        Freeing what is cached may be enough, and who was concerned may have ended meanwhile.
        """
        is_first = num_run > self._spared_run + 1
        self._spared_run = num_run
        if is_first:
            return []
        if kind is FaultKind.MEMORY:
            return [max(reversed(chunks), key=lambda chunk: chunk.num_tokens).sequence]
        return [chunk.sequence for chunk in chunks]


def release_frames(cause: BaseException) -> None:
    """Let go of the tensors that the frames of an exception hold, so that they can be freed."""
    for error in _chain(cause):
        traceback.clear_frames(error.__traceback__)


def _chain(cause: BaseException) -> Iterator[BaseException]:
    """An exception and its causes; what it merely happened to interrupt is another story."""
    error: BaseException | None = cause
    while error is not None:
        yield error
        error = error.__cause__


def _is_memory_fault(error: BaseException) -> bool:
    # On a CPU, torch has no class of its own for it.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def _is_concerned(sequence: Sequence, kind: FaultKind, error: ServiceError) -> bool:
    if isinstance(error, MethodFaultError):
        return sequence.method == error.method and error.slot in {None, sequence.slot}
    return kind is not FaultKind.MEMORY


def _leaves_traces(method: SparseAttentionMethod) -> bool:
    """Whether running a chunk twice differs from running it once.

    Keys and values are written over, and counted only once all layers ran; but page summaries and
    page scores are sums, and some layers may have added to them.
    """
    return method.uses_summaries or overrides(method, "score_pages")
