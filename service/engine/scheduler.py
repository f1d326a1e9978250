"""Who runs next, and how many tokens of each.

A sequence has tokens not yet computed; the scheduler never asks whether it prefills or decodes.
"""

from collections import deque
from dataclasses import dataclass

from service.engine.kv_cache import PageAllocator
from service.engine.sequence import Sequence


@dataclass(frozen=True)
class Chunk:
    """The next tokens of one sequence: [start, start + num_tokens)."""

    sequence: Sequence
    start: int
    num_tokens: int

    @property
    def stop(self) -> int:
        """Position after the last token."""
        return self.start + self.num_tokens

    @property
    def completes(self) -> bool:
        """Whether the next token can be sampled after this chunk."""
        return self.stop == self.sequence.num_tokens


@dataclass(frozen=True)
class Limits:
    """Bounds of one step.

    Attributes:
        max_step_tokens: Token budget of a step.
        max_running: Sequences that run at once.
        block_size: Prefill chunks end on multiples of it, except at the prompt's end.
    """

    max_step_tokens: int
    max_running: int
    block_size: int


class OutOfPagesError(Exception):
    """A running sequence needs a page, and nobody may be made to give one up."""


class Scheduler:
    """Holds the waiting and the running sequences and deals out each step's token budget."""

    def __init__(self, limits: Limits, pages: PageAllocator) -> None:
        self._limits = limits
        self._pages = pages
        self._free_slots = list(range(limits.max_running - 1, -1, -1))
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preempted: list[Sequence] = []

    @property
    def num_pages_used(self) -> int:
        """Pages owned by sequences."""
        return self._pages.num_used

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is, and free what it owns."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def restart(self, sequence: Sequence) -> None:
        """Send a sequence, if it runs, back to the head of the queue, to be computed anew."""
        if sequence in self.running:
            self._preempt(sequence)

    def schedule(self, *, may_preempt: bool = True) -> list[Chunk]:
        """Pick the next step's work; sequences that gave way are listed in ``preempted``.

        Args:
            may_preempt: False while tokens are pending: a sequence that gave way would lose the
                slot through which its pending token is found.

        Raises:
            OutOfPagesError: Somebody would have to give way. Nothing has changed, except that
                sequences may own pages already that their next tokens need.
        """
        self.preempted = []
        chunks, unspent = self._continue_running(self._limits.max_step_tokens, may_preempt)
        if not self.preempted:
            chunks += self._admit_waiting(unspent)
        return chunks

    def _continue_running(
        self,
        budget: int,
        may_preempt: bool,  # noqa: FBT001 - handed on
    ) -> tuple[list[Chunk], int]:
        """Decoding sequences come first, so that a long prefill never holds them up."""
        chunks: list[Chunk] = []
        for sequence in sorted(self.running, key=lambda s: s.num_uncomputed_tokens > 1):
            num_tokens = self._chunk_size(sequence, budget)
            if (
                sequence.slot is None or num_tokens == 0
            ):  # it gave way meanwhile, or nothing is left
                continue
            if not may_preempt and not self._pages.try_reserve(sequence, num_tokens):
                raise OutOfPagesError
            if self._make_room(sequence, num_tokens, chunks):
                chunks.append(Chunk(sequence, sequence.num_computed_tokens, num_tokens))
                budget -= num_tokens
        return chunks, budget

    def _admit_waiting(self, budget: int) -> list[Chunk]:
        chunks = []
        while self.waiting and self._free_slots:
            sequence = self.waiting[0]
            num_tokens = self._chunk_size(sequence, budget)
            if num_tokens == 0 or not self._pages.try_reserve(sequence, num_tokens):
                break
            self.waiting.popleft()
            sequence.slot = self._free_slots.pop()
            self.running.append(sequence)
            chunks.append(Chunk(sequence, 0, num_tokens))
            budget -= num_tokens
        return chunks

    def _chunk_size(self, sequence: Sequence, budget: int) -> int:
        """Tokens to compute next; a cut inside the prompt falls on a block boundary."""
        if sequence.awaits_last_token:
            return 0
        num_tokens = min(sequence.num_uncomputed_tokens, budget)
        stop = sequence.num_computed_tokens + num_tokens
        if stop < sequence.num_prompt_tokens:
            num_tokens -= stop % self._limits.block_size
        return max(0, num_tokens)

    def _make_room(self, sequence: Sequence, num_tokens: int, chunks: list[Chunk]) -> bool:
        """Reserve pages, sending the newest sequences back to the queue while there are none."""
        while not self._pages.try_reserve(sequence, num_tokens):
            youngest = self.running[-1]
            self._preempt(youngest)
            chunks[:] = [chunk for chunk in chunks if chunk.sequence is not youngest]
            if youngest is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Send a running sequence back to the head of the queue, to be recomputed."""
        self.running.remove(sequence)
        self._release(sequence)
        sequence.num_computed_tokens = 0
        sequence.num_preemptions += 1
        self.waiting.appendleft(sequence)
        self.preempted.append(sequence)

    def _release(self, sequence: Sequence) -> None:
        self._pages.release(sequence)
        if sequence.slot is not None:
            self._free_slots.append(sequence.slot)
            sequence.slot = None
