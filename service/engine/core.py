"""One engine step: schedule, run, sample, detokenise, finish. Knows no threads and no HTTP.

A step is launched, which asks everything of the device and waits for nothing, and later collected,
which waits for its tokens. An engine that runs ahead launches the next step before it collects the
last one, so that the device works while the host deals with tokens.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from service.engine.deadlines import Deadlines
from service.engine.events import EngineEvents
from service.engine.model_runner import ModelRunner
from service.engine.prompt_logprobs import PromptReport
from service.engine.sampled import Sampled, no_token_error
from service.engine.sampler import Sampler
from service.engine.scheduler import Chunk, OutOfPagesError, Scheduler
from service.engine.sequence import Finish, FinishReason, Sequence, TokenLogprob, Update
from service.engine.stopping import OutputBuilder
from service.errors import QueueTimeoutError, ServiceError
from sparse_methods.statistics import RequestStatistics

_EXPIRED = "The request waited for its turn until its time was up. Retry later."


@dataclass
class _Progress:
    """What only a live sequence needs: its text so far, and when its last token came."""

    text: OutputBuilder
    last_token_at: float | None = None
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)


@dataclass(frozen=True)
class _Launched:
    """A step that the device may still be working on.

    Attributes:
        completed: Sequences that get a token, in the order of ``sampled``.
        num_runs: Runs begun so far, this step's own included.
    """

    chunks: list[Chunk]
    completed: list[Sequence]
    prompts: list[PromptReport]
    sampled: Sampled
    num_runs: int
    launched_at: float

    @property
    def is_awaited(self) -> bool:
        """Whether what may come next depends on tokens that only the device knows yet."""
        return any(sequence.matcher is not None for sequence in self.completed)


class EngineCore:
    """Owns the sequences between submission and their end.

    Running ahead, a sequence computes the row of a token that only the device knows yet. If that
    token turns out to have ended it, the row is thrown away: no token of it is taken, and the
    statistics are those before its run. Its pages and its slot are given away at once, because the
    device does all work in the order in which it was launched: whoever gets them writes later.

    Args:
        runs_ahead: Whether ``step`` returns with its own tokens still to be collected.
    """

    def __init__(
        self,
        runner: ModelRunner,
        scheduler: Scheduler,
        sampler: Sampler,
        events: EngineEvents,
        text_output: Callable[[Sequence], OutputBuilder],
        *,
        runs_ahead: bool,
    ) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._sampler = sampler
        self._events = events
        self._text_output = text_output
        self._live: dict[Sequence, _Progress] = {}
        self._runs_ahead = runs_ahead
        if runs_ahead:
            runner.keep_statistics()
        self._launched: _Launched | None = None
        self._num_collected_runs = 0
        self._collected_at = 0.0
        self._at_fault: list[Chunk] = []
        self._updates: dict[Sequence, Update] = {}
        self._deadlines = Deadlines()

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self._scheduler.has_work or self._launched is not None

    @property
    def num_running(self) -> int:
        """Sequences that are being computed."""
        return self._scheduler.num_unfinished - self._scheduler.num_unstarted

    @property
    def num_waiting(self) -> int:
        """Sequences of which nothing is being computed yet, or not any more."""
        return self._scheduler.num_unstarted

    @property
    def num_pages_used(self) -> int:
        """Pages owned by sequences."""
        return self._scheduler.num_pages_used

    @property
    def num_waiting_tokens(self) -> int:
        """Tokens to compute of the sequences that wait."""
        return self._scheduler.num_unstarted_tokens

    @property
    def prompt_tokens_per_s(self) -> float:
        """Pace of recent steps that computed prompts; 0 before the first."""
        return self._scheduler.prompts.tokens_per_s

    def add(self, sequence: Sequence) -> None:
        """Take a sequence in."""
        self._deadlines.watch(sequence)
        self._live[sequence] = _Progress(self._text_output(sequence))
        self._scheduler.add(sequence)

    def abort(self, sequence: Sequence, reason: str) -> None:
        """End a sequence early and free its pages."""
        if sequence in self._live:
            self._finish(sequence, FinishReason.ABORT, None)
            self._events.aborted(reason)

    def cancel(self, sequence: Sequence) -> dict[Sequence, Update]:
        """End a sequence early because its reader wants no more than it has."""
        if sequence not in self._live:
            return {}
        text = self._live[sequence].text.abort()
        finish = self._finish(sequence, FinishReason.ABORT, None)
        self._events.aborted("cancelled")
        return {sequence: Update(text=text, finish=finish)}

    def step(self) -> dict[Sequence, Update]:
        """Run one step and return what was added to whom: by it, or running ahead, by the last."""
        self._updates, self._at_fault = {}, []
        self._expire()
        previous, self._launched = self._launched, None
        if previous is not None and previous.is_awaited:
            self._collect(previous)
            previous = None
        try:
            self._launched = self._launch(may_preempt=previous is None)
        finally:  # what the previous step produced is delivered even if the next one fails
            if previous is not None:
                self._collect(previous)
        if not self._runs_ahead and self._launched is not None:
            launched, self._launched = self._launched, None
            self._collect(launched)
        return self._updates

    def _expire(self) -> None:
        """End whoever's time is up: with what there is, or if it never ran, with an error."""
        for sequence in self._deadlines.expired(self._live, time.monotonic()):
            has_run = sequence.first_scheduled_at is not None
            text = self._live[sequence].text.abort() if has_run else ""
            finish = self._finish(sequence, FinishReason.ABORT, None)
            self._events.aborted("deadline")
            error = None if has_run else QueueTimeoutError(_EXPIRED)
            self._updates[sequence] = Update(text, finish=finish if has_run else None, error=error)

    def fail_step(self, error: ServiceError) -> dict[Sequence, Update]:
        """Fail the sequences of the step that just raised; the others go on.

        Returns what was already added, too: some sequences may have ended.
        """
        self._events.engine_error()
        sequences = [chunk.sequence for chunk in self._at_fault if chunk.sequence in self._live]
        if not self._at_fault:  # the scheduler itself failed: nobody is innocent
            sequences = list(self._live)
        for sequence in dict.fromkeys(sequences):
            added = self._updates.get(sequence, Update())
            self._updates[sequence] = added + self._fail(sequence, error)
        return self._updates

    def fail_all(self, error: ServiceError, reason: str) -> dict[Sequence, Update]:
        """Fail every sequence, as the engine ends."""
        self._launched = None
        sequences = list(self._live)
        for _ in sequences:
            self._events.aborted(reason)
        return {sequence: self._fail(sequence, error) for sequence in sequences}

    def _launch(self, *, may_preempt: bool) -> _Launched | None:
        """Ask the next step of the device; None if there is nothing to run, or not yet."""
        launched_at = time.monotonic()
        try:
            chunks = self._scheduler.schedule(may_preempt=may_preempt)
        except OutOfPagesError:
            return None  # the next step may preempt, for this one leaves no token pending
        for _ in self._scheduler.preempted:
            self._events.preempted()
        if not chunks:
            return None
        with self._answering_for(chunks):
            for chunk in chunks:
                if chunk.sequence.first_scheduled_at is None:
                    chunk.sequence.first_scheduled_at = launched_at
            logits, completed = self._runner.run(chunks)
            prompts = self._sampler.report_prompts(logits[len(completed) :], chunks)
            sampled = self._sampler.sample(logits[: len(completed)], completed)
            self._runner.keep_tokens(completed, sampled.token_ids)
            self._scheduler.advance(chunks)
            for sequence in completed:
                sequence.num_pending_tokens += 1
        return _Launched(chunks, completed, prompts, sampled, self._runner.num_runs, launched_at)

    def _collect(self, step: _Launched) -> None:
        """Wait for a step and deal out its tokens to those who still want them."""
        with self._answering_for(step.chunks):
            result = step.sampled.result()
            self._num_collected_runs = step.num_runs
            for report in step.prompts:
                if report.sequence in self._live:
                    report.extend(self._live[report.sequence].prompt_logprobs)
            for sequence in step.completed:
                sequence.num_pending_tokens -= 1
            for index, sequence in enumerate(step.completed):
                if sequence not in self._live:  # aborted, or ended by the token before
                    continue
                if index in result.failed:
                    self._events.engine_error()
                    self._updates[sequence] = self._fail(sequence, no_token_error(sequence))
                else:
                    token_id, logprob = result.token_ids[index], result.logprobs[index]
                    self._updates[sequence] = self._append(sequence, token_id, logprob)
            now = time.monotonic()
            seconds = now - max(step.launched_at, self._collected_at)  # no second counts twice
            self._collected_at = now
            num_tokens = sum(chunk.num_tokens for chunk in step.chunks)
            phase = _phase(step.chunks)
            if phase != "decode":
                self._scheduler.prompts.note_pace(num_tokens, seconds)
            self._events.step(phase, seconds, num_tokens)

    @contextmanager
    def _answering_for(self, chunks: list[Chunk]) -> Iterator[None]:
        """Whatever raises inside is the fault of these chunks."""
        try:
            yield
        except BaseException:
            self._at_fault += chunks
            raise

    def _append(self, sequence: Sequence, token_id: int, logprob: TokenLogprob | None) -> Update:
        progress = self._live[sequence]
        now = time.monotonic()
        is_first = not sequence.output_ids
        if sequence.first_token_at is None:
            sequence.first_token_at = now
            self._events.first_token(sequence, now - sequence.arrived_at)
        elif progress.last_token_at is not None:
            self._events.inter_token(now - progress.last_token_at)
        progress.last_token_at = now
        sequence.output_ids.append(token_id)
        text, ending = progress.text.push(token_id)
        finish = None if ending is None else self._finish(sequence, *ending)
        logprobs = () if logprob is None else (logprob,)
        prompt_logprobs = tuple(progress.prompt_logprobs) if is_first else ()
        return Update(text, (token_id,), logprobs, finish, prompt_logprobs=prompt_logprobs)

    def _finish(
        self, sequence: Sequence, reason: FinishReason, stop_reason: str | int | None
    ) -> Finish:
        finish = Finish(
            reason=reason,
            stop_reason=stop_reason,
            statistics=self._statistics(sequence, reason),
            timing=sequence.timing(),
            num_prompt_tokens=sequence.num_prompt_tokens,
            num_cached_tokens=sequence.num_cached_tokens,
            num_generated_tokens=len(sequence.output_ids),
        )
        self.discard(sequence)
        self._events.finished(sequence, finish)
        return finish

    def _statistics(self, sequence: Sequence, reason: FinishReason) -> RequestStatistics:
        """What was read; nothing for a failure, after which the device may not answer."""
        # Whoever has computed nothing has not cleared the counters of its place either.
        if reason is FinishReason.ERROR or sequence.num_own_tokens == 0:
            return RequestStatistics()
        return self._runner.statistics(sequence, self._num_collected_runs)

    def _fail(self, sequence: Sequence, error: ServiceError) -> Update:
        self._scheduler.distrust([sequence])
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
