"""The only door to the engine: submit a request, follow its generation, ask for the status."""

import asyncio
import dataclasses
import time
from functools import partial
from typing import Any

import torch

from service.engine.admission import Admission
from service.engine.core import EngineCore
from service.engine.events import EngineEvents, FaultKind
from service.engine.generation import (
    Generation,
    GenerationRequest,
    build_sequences,
    check_logit_bias,
)
from service.engine.grammar import GrammarCompiler
from service.engine.kv_cache import PageAllocator
from service.engine.loop import Address, EngineLoop
from service.engine.model_runner import ModelRunner
from service.engine.outbox import Outbox
from service.engine.parallel import (
    LeadingRunner,
    Ranks,
    check_splits,
    group_of,
    load_share,
    num_pages_of_all,
    starting_ranks,
)
from service.engine.sampler import Sampler
from service.engine.scheduler import Limits, Scheduler
from service.engine.status import EngineStatus
from service.engine.stopping import OutputBuilder
from service.engine.tokenizer import Tokenizer
from service.engine.trial import packed_logits
from service.engine.watchdog import Watchdog
from service.errors import (
    BadRequestError,
    PromptTooLongError,
    TokenizerError,
    UnavailableError,
)
from service.models.calibration_file import load_calibrations
from service.models.hugging_face import Progress
from service.models.loading import LoadedModel
from service.models.self_test import SelfTestReport, run_self_test
from service.settings import Settings
from sparse_methods import SparseAttentionMethod, get_sparse_method, latest_version

_HANG_FACTOR = 4  # of the time after which the engine counts as stuck


class Engine:
    """A loaded model with its engine thread.

    Attributes:
        attention: Name of the attention implementation in use.
        self_test: What the test at load measured.
        notes: What an operator may want to know of the model, one sentence each.
        runner: The model; its attention may be measured before the thread starts.
        core: What the engine thread drives; tests and benchmarks may drive it themselves.
        default_method: Name and version of requests that name none.
    """

    def __init__(
        self,
        settings: Settings,
        loaded: LoadedModel,
        events: EngineEvents,
        ranks: Ranks | None = None,
    ) -> None:
        self.settings = settings
        self._ranks = ranks
        self.events = events
        self.tokenizer = Tokenizer.load(loaded.directory, loaded.eos_token_ids)
        self._grammars = GrammarCompiler(self.tokenizer)
        self.model_name, self.notes = loaded.name, loaded.notes
        self.default_method = (settings.method, latest_version(settings.method))
        get_sparse_method(settings.method)().check_servable(settings.block_size)
        self._calibrations = load_calibrations(settings.calibration, loaded.directory)
        geometries = [layer.geometry for layer in loaded.layers]
        self._num_pages = num_pages_of_all(settings, geometries, loaded, group_of(ranks))
        capacity = self._num_pages * settings.block_size
        self.max_context_tokens = min(loaded.max_context_tokens, capacity)
        embeddings: Any = loaded.model.get_input_embeddings()
        self._num_embeddings = int(embeddings.weight.shape[0])
        runner = (ModelRunner if ranks is None else partial(LeadingRunner, ranks))(
            loaded.model,
            [(layer.module, layer.geometry) for layer in loaded.layers],
            num_pages=self._num_pages,
            block_size=settings.block_size,
            num_slots=settings.max_running_requests,
        )
        self.device, self.dtype = str(runner.device), str(runner.dtype).removeprefix("torch.")
        self.attention = runner.attention_name
        self.runner = runner
        self.core = self._build_core(runner)
        self._loop = EngineLoop(self.core, settings.stall_timeout_s)
        if ranks is not None:
            ranks.followers.on_failure(self._loop.abandon)
        self._admission = Admission(settings, capacity, self.core, self._loop)
        self._is_draining = False
        self._watchdog = Watchdog(_HANG_FACTOR * settings.stall_timeout_s)
        self.self_test: SelfTestReport | None = None

    @classmethod
    def load(
        cls, settings: Settings, events: EngineEvents, progress: Progress | None = None
    ) -> "Engine":
        """Load the model of ``settings`` and test the packed path against the plain model.

        ``progress`` is called with (stage, done, total).

        Raises:
            ModelNotSupportedError: The model cannot be served; the message says why.
        """
        with starting_ranks(settings) as ranks:
            loaded = load_share(settings, group_of(ranks), progress)
            engine = cls(settings, loaded, events, ranks)
            engine.self_test = run_self_test(loaded, engine.trial_logits, engine.max_trial_tokens)
        if progress is not None:
            progress("self-test", 1, 1)
        return engine

    def start(self) -> None:
        """Start the engine thread."""
        self._loop.start()

    def stop(self) -> None:
        """Abort whatever runs and end the engine thread."""
        self._is_draining = True
        self._loop.stop()
        if self._ranks is not None:
            self._ranks.stop(self.runner)

    @property
    def is_busy(self) -> bool:
        """Whether the engine thread runs, even if it serves nobody any more."""
        return self._loop.is_busy

    def watch(self) -> None:
        """Give the engine up if it hangs; whoever serves calls this again and again."""
        age_s = self._idle_s
        if self._watchdog.bites(age_s) and self._loop.is_alive:
            self.events.engine_error(FaultKind.HANG)
            self._loop.abandon(f"it has made no progress for {age_s:.0f} s")

    def drain(self) -> None:
        """Refuse new work from now on; running generations go on."""
        self._is_draining = True

    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait until nothing runs or waits; False if that took longer than ``timeout_s``."""
        deadline = time.monotonic() + timeout_s
        while self._loop.num_unfinished:
            if time.monotonic() >= deadline:
                return False
            await asyncio.sleep(0.02)
        return True

    async def submit(self, request: GenerationRequest) -> Generation:
        """Queue a request.

        Raises:
            UnavailableError: The engine is draining or dead.
            QueueFullError: Too many generations wait.
            PromptTooLongError: The prompt leaves no room for an answer.
            BadRequestError: The prompt is empty, it or a bias has unknown tokens, or no text could
                satisfy the grammar.
        """
        request = dataclasses.replace(request, method=self.calibrated(request.method))
        request.method.check_servable(self.settings.block_size)
        check_splits(request.method, group_of(self._ranks))
        check_logit_bias(request.sampling, self.tokenizer.vocab_size)
        self._check_admission(request.n, 0)  # before the work of encoding, and again after it
        prompt_ids = await self._encode(request)
        self._check_prompt(prompt_ids)
        matcher = await self._grammars.matcher(request.sampling.grammar)
        self._check_admission(request.n, request.n * len(prompt_ids))
        outbox, event_loop = Outbox(), asyncio.get_running_loop()
        room = self.max_context_tokens - len(prompt_ids)
        sequences = build_sequences(request, prompt_ids, room, self.settings)
        for index, sequence in enumerate(sequences):
            sequence.matcher = None if matcher is None else matcher.fork()
            self._loop.add(sequence, Address(event_loop, outbox, index))
        return Generation(self._loop, sequences, outbox)

    def calibrated(self, method: SparseAttentionMethod) -> SparseAttentionMethod:
        """The method bound to what was calibrated of it for this model."""
        for calibration in self._calibrations:
            method = method.with_calibration(calibration)
        return method

    def status(self) -> EngineStatus:
        """State of the engine, read without waiting."""
        is_stalled = (age_s := self._idle_s) > self.settings.stall_timeout_s
        is_alive = self._loop.is_alive  # before the reason for its death, which is set first
        reason = ""
        if self._loop.death:
            reason = f"the engine cannot go on: {self._loop.death}"
        elif not is_alive:
            reason = "the engine thread is not running"
        elif self._is_draining:
            reason = "the server is draining"
        elif is_stalled:
            reason = f"the engine has made no progress for {age_s:.0f} s"
        return EngineStatus(
            loaded=True,
            is_alive=is_alive,
            is_draining=self._is_draining,
            is_stalled=is_stalled,
            reason=reason,
            num_running=self.core.num_running,
            num_waiting=self.core.num_waiting,
            num_pages_total=self._num_pages,
            num_pages_used=self.core.num_pages_used,
        )

    @property
    def max_trial_tokens(self) -> int:
        """Longest prompt of a trial run; four of them fit into the cache."""
        return max(self.settings.block_size, self._num_pages // 4 * self.settings.block_size)

    def trial_logits(self, prompts: list[list[int]]) -> list[torch.Tensor]:
        """[len, V] logits of each prompt through the packed path, before the thread starts."""
        return packed_logits(self.runner, prompts, self.settings.max_step_tokens)

    @property
    def _idle_s(self) -> float:
        """Seconds since the engine last showed that it makes progress."""
        return time.monotonic() - max(self._loop.heartbeat, self.runner.heartbeat)

    def _build_core(self, runner: ModelRunner) -> EngineCore:
        settings = self.settings
        pages = PageAllocator(self._num_pages, settings.block_size)
        limits = Limits(
            max_step_tokens=settings.max_step_tokens,
            max_running=settings.max_running_requests,
            block_size=settings.block_size,
            max_prefill_s=settings.max_prefill_s,
        )
        return EngineCore(
            runner=runner,
            scheduler=Scheduler(limits, pages),
            sampler=Sampler(runner.device, self.tokenizer.vocab_size, self.tokenizer.eos_token_ids),
            events=self.events,
            text_output=lambda sequence: OutputBuilder(
                self.tokenizer, sequence.prompt_ids, sequence.sampling
            ),
            runs_ahead=runner.device.type == "cuda"
            if settings.run_ahead is None
            else settings.run_ahead,
        )

    def _check_admission(self, num_choices: int, num_tokens: int) -> None:
        status = self.status()
        if status.reason:
            raise UnavailableError(f"No new work is accepted: {status.reason}.")
        self._admission.check(num_choices, num_tokens)

    async def _encode(self, request: GenerationRequest) -> list[int]:
        if request.prompt_ids is not None:
            return request.prompt_ids
        prompt = request.prompt or ""
        if not prompt:
            raise BadRequestError("The prompt is empty; give at least one character.", "prompt")
        limit = self.max_context_tokens * self.tokenizer.max_chars_of_token
        if len(prompt) > limit:
            raise PromptTooLongError(
                f"The prompt has {len(prompt)} characters, more than the {limit} that could fit"
                f" into the context of {self.max_context_tokens} tokens.",
                "prompt",
            )
        try:
            return await asyncio.to_thread(
                self.tokenizer.encode, prompt, adds_special_tokens=request.adds_special_tokens
            )
        except TokenizerError:
            self.events.engine_error(FaultKind.TOKENIZER)
            raise

    def _check_prompt(self, prompt_ids: list[int]) -> None:
        if not prompt_ids:
            raise BadRequestError("The prompt is empty; give at least one token.", "prompt")
        if min(prompt_ids) < 0 or max(prompt_ids) >= self._num_embeddings:
            raise BadRequestError(
                f"A prompt token is outside of the vocabulary: ids go from 0 to"
                f" {self._num_embeddings - 1}.",
                "prompt_token_ids",
            )
        if len(prompt_ids) >= self.max_context_tokens:
            raise PromptTooLongError(
                f"The prompt has {len(prompt_ids)} tokens, but the context holds"
                f" {self.max_context_tokens} and must leave room for at least one new token.",
                "prompt",
            )
