"""Who runs next, and how many tokens of each.

A step takes one token of everybody who decodes, then as many of prompts as the budget allows. While
somebody decodes, that is as many as fit, at the pace of recent steps, into the time that others may
be held up for; a block at least, so that prompts get on. Among prompts the one with the fewest
tokens left goes first, so that a short one does not wait for a long one; but half of the prompts'
share is the oldest one's, so that none starves.

Whoever waits is admitted by priority, then by arrival, and only if there are pages for all its
tokens and a page of output beside what those who run will need. Nobody overtakes in the queue, so a
long prompt at its head does get its pages. When pages run out nonetheless, the youngest of the
lowest priority gives way.
"""

import math
from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass, field

from service.engine.kv_cache import PageAllocator
from service.engine.prompt_shares import PromptShares
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

    @property
    def is_first(self) -> bool:
        """Whether the sequence has computed nothing before, or not since it started over."""
        return self.start == self.sequence.num_cached_tokens


@dataclass(frozen=True)
class Limits:
    """Bounds of one step.

    Attributes:
        max_step_tokens: Token budget of a step.
        max_running: Sequences that run at once.
        block_size: Prefill chunks end on multiples of it, except at the prompt's end.
        max_prefill_s: Seconds that prompts may take in a step in which somebody decodes.
    """

    max_step_tokens: int
    max_running: int
    block_size: int
    max_prefill_s: float = math.inf


class OutOfPagesError(Exception):
    """A running sequence needs a page, and nobody may be made to give one up."""


class Scheduler:
    """Holds the waiting and the running sequences and deals out each step's token budget.

    Attributes:
        waiting: By priority, then arrival.
        running: Whoever has a place; what it needs of pages comes with its chunks.
        preempted: Whoever gave way when the last step was scheduled.
        prompts: What prompts may take of a step.
    """

    def __init__(self, limits: Limits, pages: PageAllocator) -> None:
        self._limits = limits
        self._pages = pages
        self._free_slots = list(range(limits.max_running - 1, -1, -1))
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preempted: list[Sequence] = []
        self._num_queued_tokens = 0
        self.prompts = PromptShares(limits.block_size, limits.max_prefill_s)

    @property
    def num_pages_used(self) -> int:
        """Pages owned by sequences."""
        return self._pages.num_used

    @property
    def num_started(self) -> int:
        """Sequences that are being computed."""
        # A copy, as probes ask from another thread.
        return sum(sequence.num_own_tokens > 0 for sequence in list(self.running))

    @property
    def num_unstarted(self) -> int:
        """Sequences of which nothing is being computed, whether they have a place or not."""
        return len(self.waiting) + len(self._placed_and_idle())

    @property
    def num_unstarted_tokens(self) -> int:
        """Tokens to compute of these sequences."""
        placed = sum(sequence.num_uncomputed_tokens for sequence in self._placed_and_idle())
        return self._num_queued_tokens + placed

    def _placed_and_idle(self) -> list[Sequence]:
        # A copy, as probes ask from another thread.
        return [sequence for sequence in list(self.running) if sequence.num_own_tokens == 0]

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that has computed nothing."""
        insort(self.waiting, sequence, key=_rank)
        self._num_queued_tokens += sequence.num_tokens

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is, and free what it owns."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
            self._num_queued_tokens -= sequence.num_tokens

    def advance(self, chunks: Iterable[Chunk]) -> None:
        """Take note that the step which computes these chunks was launched."""
        for chunk in chunks:
            chunk.sequence.num_computed_tokens = chunk.stop
            if chunk.start < chunk.sequence.num_prompt_tokens:
                self._pages.publish(chunk.sequence, chunk.start, chunk.stop)

    def distrust(self, sequence: Sequence) -> None:
        """Reuse nothing of the pages of a sequence that failed."""
        self._pages.retract(sequence)

    def distrust_written(self, chunks: Iterable[Chunk]) -> list[Sequence]:
        """Reuse nothing that was to be written by a step that failed after its launch.

        Returns:
            Whoever has taken over some of it already; nothing of theirs is reused either.
        """
        pages: set[int] = set()
        for chunk in chunks:
            pages |= self._pages.retract_written(chunk.sequence, chunk.start, chunk.stop)
        sharing = [s for s in self.running if pages.intersection(self._pages.taken_over(s))]
        for sequence in sharing:
            self._pages.retract(sequence)
        return sharing

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
            OutOfPagesError: Somebody would have to give way. Nothing is to be computed, though
                sequences may own a place and pages already that their next tokens need.
        """
        self.preempted = []
        step = _Step(self._limits.max_step_tokens, may_preempt)
        decoding = [s for s in self.running if s.num_uncomputed_tokens <= 1]
        for sequence in decoding:
            self._continue(sequence, step, step.budget)
        if step.chunks:
            step.budget = min(step.budget, self.prompts.tokens_beside_decoding)
        if not self.preempted:
            self._admit()
        served = set(decoding)
        self._prefill([s for s in self.running if s not in served], step)
        return step.chunks

    def _prefill(self, sequences: list[Sequence], step: "_Step") -> None:
        """Share what is left of the budget among those who have a prompt to compute."""
        for sequence in sequences:
            self._pages.reuse(sequence)
        computing = [s for s in sequences if s.num_own_tokens > 0]  # few, as one gets done first
        ready = [s for s in sequences if not self._is_served_by(computing, s)]
        if not ready:
            return
        oldest = min(ready, key=_rank)
        kept = min(oldest.num_uncomputed_tokens, self.prompts.share_of_oldest(step.budget))
        ready.sort(key=lambda s: (s.priority, s.num_uncomputed_tokens, s.arrived_at))
        for sequence in ready:
            if sequence is oldest:
                kept = 0
            elif step.budget <= kept or self._is_served_by(computing, sequence):
                continue
            if self._continue(sequence, step, step.budget - kept):
                computing.append(sequence)

    def _is_served_by(self, computing: list[Sequence], sequence: Sequence) -> bool:
        """Whether somebody computes the next page of a sequence, whose turn has come with that."""
        is_served = self.prompts.is_computed_by(computing, sequence)
        if is_served:
            sequence.queue_deadline = math.inf
        return is_served

    def _continue(self, sequence: Sequence, step: "_Step", budget: int) -> bool:
        """Add the next chunk of a sequence, if there is one, of ``budget`` tokens at most."""
        num_tokens = self._chunk_size(sequence, budget)
        if sequence.slot is None or num_tokens == 0:  # it gave way meanwhile, or nothing is left
            return False
        if not step.may_preempt and not self._pages.try_reserve(sequence, num_tokens):
            raise OutOfPagesError
        if not self._make_room(sequence, num_tokens, step):
            return False
        step.chunks.append(Chunk(sequence, sequence.num_computed_tokens, num_tokens))
        step.budget -= num_tokens
        return True

    def _admit(self) -> None:
        """Give a place to whoever waits, as long as all that run would still get their pages."""
        if not self.waiting or not self._free_slots:
            return
        room = self._pages.num_free - sum(map(self._num_pages_to_come, self.running))
        while self.waiting and self._free_slots:
            sequence = self.waiting[0]
            needed = self._num_pages_to_come(sequence)
            if needed > room:
                needed -= self._pages.num_shared(sequence)
            if needed > room and self.running:
                return
            self.waiting.pop(0)
            self._num_queued_tokens -= sequence.num_tokens
            sequence.slot = self._free_slots.pop()
            self.running.append(sequence)
            room -= needed

    def _num_pages_to_come(self, sequence: Sequence) -> int:
        """Pages that a sequence still needs for its tokens and a page of output."""
        num_left = sequence.sampling.max_tokens - sequence.num_output_tokens
        num_ahead = max(0, min(num_left, self._limits.block_size))
        return self._pages.num_missing(sequence, sequence.num_tokens + num_ahead)

    def _chunk_size(self, sequence: Sequence, budget: int) -> int:
        """Tokens to compute next; a cut inside the prompt falls on a block boundary."""
        if sequence.awaits_last_token:
            return 0
        num_tokens = min(sequence.num_uncomputed_tokens, budget)
        stop = sequence.num_computed_tokens + num_tokens
        if stop < sequence.num_prompt_tokens:
            num_tokens -= stop % self._limits.block_size
        return max(0, num_tokens)

    def _make_room(self, sequence: Sequence, num_tokens: int, step: "_Step") -> bool:
        """Reserve pages, sending others back to the queue while there are none."""
        while not self._pages.try_reserve(sequence, num_tokens):
            last = max(self.running, key=_rank)
            self._preempt(last)
            step.chunks = [chunk for chunk in step.chunks if chunk.sequence is not last]
            if last is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Send a running sequence back to the queue, to be recomputed."""
        self.running.remove(sequence)
        self._release(sequence)
        if sequence.num_own_tokens > 0:
            sequence.most_cached_tokens = sequence.num_cached_tokens
        sequence.num_computed_tokens = sequence.num_cached_tokens = 0
        sequence.num_preemptions += 1
        self.add(sequence)
        self.preempted.append(sequence)

    def _release(self, sequence: Sequence) -> None:
        self._pages.release(sequence)
        if sequence.slot is not None:
            self._free_slots.append(sequence.slot)
            sequence.slot = None


@dataclass
class _Step:
    """A step while it is put together; ``budget`` is what is left of its tokens."""

    budget: int
    may_preempt: bool
    chunks: list[Chunk] = field(default_factory=list)


def _rank(sequence: Sequence) -> tuple[int, float]:
    return sequence.priority, sequence.arrived_at
