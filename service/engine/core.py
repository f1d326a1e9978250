"""One engine step: schedule, run, sample, detokenise, finish. Knows no threads and no HTTP.

A step is launched, which asks everything of the device and waits for nothing, and later collected,
which waits for its tokens. An engine that runs ahead launches the next step before it collects the
last one, so that the device works while the host deals with tokens.
"""

import logging
import time
from collections.abc import Callable

from service.engine.deadlines import Deadlines
from service.engine.events import EngineEvents, FaultKind
from service.engine.faults import Triage, diagnose, release_frames
from service.engine.launched import Launched, Progress
from service.engine.model_runner import ModelRunner
from service.engine.prompt_logprobs import FailedReport, PromptReport
from service.engine.sampled import SampleResult, no_token_error
from service.engine.sampler import Sampler
from service.engine.scheduler import OutOfPagesError, Scheduler
from service.engine.sequence import Finish, FinishReason, Sequence, TokenLogprob, Update
from service.engine.stopping import OutputBuilder
from service.errors import QueueTimeoutError, ServiceError
from sparse_methods.statistics import RequestStatistics

_EXPIRED = "The request waited for its turn until its time was up. Retry later."
_log = logging.getLogger(__name__)


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
        self._live: dict[Sequence, Progress] = {}
        self._runs_ahead = runs_ahead
        if runs_ahead:
            runner.keep_statistics()
        self._launched: Launched | None = None
        self._num_collected_runs, self._collected_at = 0, 0.0
        self._triage = Triage()
        self._updates: dict[Sequence, Update] = {}
        self._deadlines = Deadlines()

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self._scheduler.has_work or self._launched is not None

    @property
    def device_answers(self) -> bool:
        """Whether the device still computes; asking waits for it."""
        return self._runner.answers

    @property
    def num_running(self) -> int:
        """Sequences that are being computed."""
        return self._scheduler.num_started

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
        self._live[sequence] = Progress(self._text_output(sequence))
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
        self._updates = {}
        self._triage.begin_step()
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

    def fail_step(self, cause: Exception) -> dict[Sequence, Update]:
        """Fail whom the step that just raised concerns; the others go on.

        Returns what was already added, too: some sequences may have ended.
        """
        verdict = self._triage.judge(cause, self._live, self._runner.num_runs)
        verdict = verdict.spread_to(self._scheduler.distrust_written(verdict.lost))
        self._events.engine_error(verdict.kind)
        for sequence in verdict.failed:
            added = self._updates.get(sequence, Update())
            self._updates[sequence] = added + self._fail(sequence, verdict.error)
        for sequence in reversed(verdict.restarted):  # each goes to the head of the queue
            self._scheduler.restart(sequence)
            self._events.preempted()
        if verdict.kind is FaultKind.MEMORY:
            release_frames(cause)
            self._runner.free_memory()
        return self._updates

    def fail(self, sequence: Sequence, cause: Exception) -> Update:
        """End a sequence because something that concerns it alone failed."""
        _log.error("a generation failed", exc_info=cause)
        kind, error = diagnose(cause)
        self._events.engine_error(kind)
        return self._fail(sequence, error)

    def fail_all(self, error: ServiceError, reason: str) -> dict[Sequence, Update]:
        """Fail every sequence, as the engine ends."""
        self._launched = None
        updates = {sequence: self._fail(sequence, error) for sequence in list(self._live)}
        for _ in updates:
            self._events.aborted(reason)
        return updates

    def _launch(self, *, may_preempt: bool) -> Launched | None:
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
        with self._triage.repeatable(chunks):
            for chunk in chunks:
                if chunk.sequence.first_scheduled_at is None:
                    chunk.sequence.first_scheduled_at = launched_at
            logits, completed = self._runner.run(chunks)
        self._scheduler.advance(chunks)
        with self._triage.choosing(chunks):
            prompts = self._sampler.report_prompts(logits[len(completed) :], chunks)
            sampled = self._sampler.sample(logits[: len(completed)], completed)
            self._runner.keep_tokens(completed, sampled.token_ids)
            for sequence in completed:
                sequence.num_pending_tokens += 1
        return Launched(chunks, completed, prompts, sampled, self._runner.num_runs, launched_at)

    def _collect(self, step: Launched) -> None:
        """Wait for a step and deal out its tokens to those who still want them."""
        with self._triage.unrepeatable(step.chunks):
            result = step.sampled.result()
            self._num_collected_runs = step.num_runs
            for report in step.prompts:
                self._note(report)
            for sequence in step.completed:
                sequence.num_pending_tokens -= 1
            for index, sequence in enumerate(step.completed):
                if sequence in self._live:  # not aborted, nor ended by the token before
                    self._updates[sequence] = self._take(sequence, result, index)
            now = time.monotonic()
            seconds = now - max(step.launched_at, self._collected_at)  # no second counts twice
            self._collected_at = now
            if step.phase != "decode":
                self._scheduler.prompts.note_pace(step.num_tokens, seconds)
            self._events.step(step.phase, seconds, step.num_tokens)

    def _note(self, report: PromptReport | FailedReport) -> None:
        """Keep a report on a prompt until its first token; without it, its sequence fails."""
        sequence = report.sequence
        if sequence in self._live:
            try:
                report.extend(self._live[sequence].prompt_logprobs)
            except Exception as error:  # noqa: BLE001 - the others' tokens are dealt out, too
                self._updates[sequence] = self.fail(sequence, error)

    def _take(self, sequence: Sequence, result: SampleResult, index: int) -> Update:
        """Deal out the token of one row; what fails here concerns its sequence only."""
        try:
            if index in result.failed:
                self._events.engine_error(FaultKind.NUMBERS)
                return self._fail(sequence, no_token_error(sequence))
            return self._append(sequence, result.token_ids[index], result.logprobs[index])
        except Exception as error:  # noqa: BLE001 - the tokens of the others are dealt out, too
            return self.fail(sequence, error)

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
        fallback = finish.fallback_from(sequence.method)
        if fallback is not None and sequence.num_own_tokens > 0:
            self._events.fell_back(sequence, fallback.cause)
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
        self._scheduler.distrust(sequence)
        self._finish(sequence, FinishReason.ERROR, None)
        return Update(error=error)

    def discard(self, sequence: Sequence) -> None:
        """Free what a sequence owns and say nothing; one that is unknown is left alone."""
        self._scheduler.remove(sequence)
        self._live.pop(sequence, None)
