"""One engine step: schedule, run, sample, detokenise, finish. Knows no threads and no HTTP."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from service.engine.events import EngineEvents
from service.engine.kv_cache import PageAllocator
from service.engine.model_runner import ModelRunner
from service.engine.sampler import Sampler
from service.engine.scheduler import Chunk, Scheduler
from service.engine.sequence import Finish, FinishReason, Sequence, Timing, TokenLogprob, Update
from service.engine.stopping import OutputBuilder
from service.errors import GenerationError, ServiceError
from sparse_methods.statistics import RequestStatistics


@dataclass
class _Progress:
    """What only a live sequence needs: its text so far, and when its last token came."""

    text: OutputBuilder
    last_token_at: float | None = None


class EngineCore:
    """Owns the sequences between submission and their end."""

    def __init__(
        self,
        runner: ModelRunner,
        scheduler: Scheduler,
        pages: PageAllocator,
        sampler: Sampler,
        events: EngineEvents,
        text_output: Callable[[Sequence], OutputBuilder],
    ) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._pages = pages
        self._sampler = sampler
        self._events = events
        self._text_output = text_output
        self._live: dict[Sequence, _Progress] = {}
        self._in_step: list[Chunk] = []
        self._updates: dict[Sequence, Update] = {}

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self._scheduler.has_work

    @property
    def num_running(self) -> int:
        """Sequences that own pages."""
        return len(self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for pages or a place."""
        return len(self._scheduler.waiting)

    @property
    def num_pages_used(self) -> int:
        """Pages owned by sequences."""
        return self._pages.num_used

    def add(self, sequence: Sequence) -> None:
        """Take a sequence in."""
        self._live[sequence] = _Progress(self._text_output(sequence))
        self._scheduler.add(sequence)

    def abort(self, sequence: Sequence, reason: str) -> None:
        """End a sequence early and free its pages."""
        if sequence in self._live:
            self._finish(sequence, FinishReason.ABORT, None)
            self._events.aborted(reason)

    def step(self) -> dict[Sequence, Update]:
        """Run one step and return what it added to whom."""
        started_at = time.monotonic()
        self._in_step, self._updates = [], {}
        chunks = self._in_step = self._scheduler.schedule()
        for _ in self._scheduler.preempted:
            self._events.preempted()
        if not chunks:
            return {}
        for chunk in chunks:
            if chunk.sequence.first_scheduled_at is None:
                chunk.sequence.first_scheduled_at = started_at
        logits, completed = self._runner.run(chunks)
        for chunk in chunks:
            chunk.sequence.num_computed_tokens = chunk.stop
        self._sample(logits, completed)
        self._events.step(
            _phase(chunks), time.monotonic() - started_at, sum(c.num_tokens for c in chunks)
        )
        return self._updates

    def fail_step(self, error: ServiceError) -> dict[Sequence, Update]:
        """Fail the sequences of the step that just raised; the others go on.

        Returns what the step had already added, too: some sequences may have ended in it.
        """
        self._events.engine_error()
        sequences = [chunk.sequence for chunk in self._in_step if chunk.sequence in self._live]
        if not sequences:  # the scheduler itself failed: nobody is innocent
            sequences = list(self._live)
        return self._updates | {sequence: self._fail(sequence, error) for sequence in sequences}

    def fail_all(self, error: ServiceError, reason: str) -> dict[Sequence, Update]:
        """Fail every sequence, as the engine ends."""
        sequences = list(self._live)
        for _ in sequences:
            self._events.aborted(reason)
        return {sequence: self._fail(sequence, error) for sequence in sequences}

    def _sample(self, logits: torch.Tensor, completed: list[Sequence]) -> None:
        if not completed:
            return
        result = self._sampler.sample(logits, completed)
        for index, sequence in enumerate(completed):
            if index in result.failed:
                self._events.engine_error()
                failure = GenerationError("The model's output for this request is not a number.")
                self._updates[sequence] = self._fail(sequence, failure)
            else:
                token_id, logprob = result.token_ids[index], result.logprobs[index]
                self._updates[sequence] = self._append(sequence, token_id, logprob)

    def _append(self, sequence: Sequence, token_id: int, logprob: TokenLogprob | None) -> Update:
        progress = self._live[sequence]
        now = time.monotonic()
        if sequence.first_token_at is None:
            sequence.first_token_at = now
            self._events.first_token(sequence, now - sequence.arrived_at)
        elif progress.last_token_at is not None:
            self._events.inter_token(now - progress.last_token_at)
        progress.last_token_at = now
        sequence.output_ids.append(token_id)
        text, ending = progress.text.push(token_id)
        finish = None if ending is None else self._finish(sequence, *ending)
        return Update(text, (token_id,), () if logprob is None else (logprob,), finish)

    def _finish(
        self, sequence: Sequence, reason: FinishReason, stop_reason: str | int | None
    ) -> Finish:
        finish = Finish(
            reason=reason,
            stop_reason=stop_reason,
            statistics=self._statistics(sequence, reason),
            timing=_timing(sequence),
            num_prompt_tokens=sequence.num_prompt_tokens,
            num_cached_tokens=0,
            num_generated_tokens=len(sequence.output_ids),
        )
        self.discard(sequence)
        self._events.finished(sequence, finish)
        return finish

    def _statistics(self, sequence: Sequence, reason: FinishReason) -> RequestStatistics:
        """What was read; nothing for a failure, after which the device may not answer."""
        if reason is FinishReason.ERROR:
            return RequestStatistics()
        return self._runner.statistics(sequence)

    def _fail(self, sequence: Sequence, error: ServiceError) -> Update:
        self._finish(sequence, FinishReason.ERROR, None)
        return Update(error=error)

    def discard(self, sequence: Sequence) -> None:
        """Free what a sequence owns and say nothing; one that is unknown is left alone."""
        self._scheduler.remove(sequence)
        self._live.pop(sequence, None)


def _phase(chunks: list[Chunk]) -> str:
    is_decode = [chunk.start >= chunk.sequence.num_prompt_tokens for chunk in chunks]
    if all(is_decode):
        return "decode"
    return "mixed" if any(is_decode) else "prefill"


def _timing(sequence: Sequence) -> Timing:
    """Durations up to now; phases that were never reached took no time."""
    now = time.monotonic()
    scheduled = sequence.first_scheduled_at or now
    first_token = sequence.first_token_at or now
    return Timing(
        queue_s=scheduled - sequence.arrived_at,
        prefill_s=first_token - scheduled,
        time_to_first_token_s=first_token - sequence.arrived_at,
        decode_s=now - first_token,
        total_s=now - sequence.arrived_at,
    )
