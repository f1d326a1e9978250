"""Runs prompts and fixed texts on an engine whose thread was not started."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from service.engine.engine import Engine
from service.engine.generation import build_sequence
from service.engine.kv_cache import PageAllocator
from service.engine.scheduler import Chunk
from service.engine.sequence import Finish, SamplingParams, Sequence, Update
from sparse_methods import SparseAttentionMethod
from sparse_methods.evaluation.agreement import WindowScores
from sparse_methods.evaluation.probes import RecallProbe, SelectionClock
from sparse_methods.views import Phase

_MAX_LOGITS = 2**27  # of one chunk, over rows and vocabulary
_TIMED_STEPS = 8  # decode steps whose time is measured


@dataclass(frozen=True)
class Output:
    """A finished generation."""

    token_ids: list[int]
    finish: Finish


class EngineDriver:
    """Drives an engine from this thread.

    Attributes:
        probe: Measures recall while it is active.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._runner = engine.runner
        attention = engine.runner.attention
        self.probe = RecallProbe(attention.implementation, len(engine.runner.geometries))
        attention.implementation = self.probe
        self._clock = SelectionClock(engine.device)

    def generate(
        self,
        prompts: list[list[int]],
        method: SparseAttentionMethod,
        samplings: list[SamplingParams],
    ) -> list[Output]:
        """Complete prompts through the engine's own steps, as many at once as fit the cache."""
        core = self._engine.core
        sequences = [
            build_sequence("evaluate", prompt, method, sampling, index)
            for index, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True))
        ]
        longest = max(len(s.prompt_ids) + s.sampling.max_tokens for s in sequences)
        waiting, finished = sequences[::-1], dict[Sequence, Finish]()
        while waiting or core.has_work:
            while waiting and core.num_running + core.num_waiting < self._num_parallel(longest):
                core.add(waiting.pop())
            finished |= dict(_finishes(core.step()))
        return [Output(sequence.output_ids, finished[sequence]) for sequence in sequences]

    def read_windows(
        self,
        windows: list[list[int]],
        method: SparseAttentionMethod,
        num_decoded: int,
        *,
        keeps_distributions: bool = True,
    ) -> list[WindowScores]:
        """Predict every token of the windows but the first from those before it.

        Args:
            windows: Token ids, all of one length.
            method: Of all of them.
            num_decoded: Last rows, which are decoded one by one with the given tokens.
            keeps_distributions: See ``WindowScores``.
        """
        size = self._num_parallel(len(windows[0]))
        scores: list[WindowScores] = []
        for start in range(0, len(windows), size):
            group = windows[start : start + size]
            empty = [WindowScores(len(ids) - 1, num_decoded, keeps_distributions) for ids in group]
            self._read(group, method, empty)
            scores += empty
        return scores

    def time(self, prompt: list[int], method: SparseAttentionMethod) -> dict[str, float | None]:
        """Seconds of one prompt alone and of its decode steps, and the share of decisions."""
        timed = self._clock.timed(method)
        sampling = SamplingParams(temperature=0, max_tokens=_TIMED_STEPS + 1, ignore_eos=True)
        if self._runner.device.type == "cuda":  # the first run compiles and captures
            self.generate([prompt], timed, [sampling])
        self._clock.reset()
        timing = self.generate([prompt], timed, [sampling])[0].finish.timing
        prefill = self._clock.seconds(Phase.PREFILL)
        decode = self._clock.seconds(Phase.DECODE)
        return {
            "prefill_seconds": timing.prefill_s,
            "decode_step_seconds": timing.decode_s / _TIMED_STEPS,
            "prefill_selection_share": None if prefill is None else prefill / timing.prefill_s,
            "decode_selection_share": None if decode is None else decode / timing.decode_s,
        }

    def _num_parallel(self, num_tokens: int) -> int:
        """How many sequences of this length fit the cache whole, so that none is preempted."""
        fitting = self._runner.num_pages // -(-num_tokens // self._runner.block_size)
        return max(1, min(fitting, self._engine.settings.max_running_requests))

    @torch.inference_mode()
    def _read(
        self, windows: list[list[int]], method: SparseAttentionMethod, scores: list[WindowScores]
    ) -> None:
        """Fill the scores of windows that fit the cache together."""
        pages = PageAllocator(self._runner.num_pages, self._runner.block_size)
        sequences = [
            _forced(ids, method, scores[slot].num_decoded, slot) for slot, ids in enumerate(windows)
        ]
        for slot in range(len(sequences)):
            self._runner.attention.forget(slot)
        for chunks in self._steps(sequences):
            for chunk in chunks:
                if not pages.try_reserve(chunk.sequence, chunk.num_tokens):
                    raise MemoryError("the KV cache is too small for one window")
            rows = self._runner.run_all_logits(chunks).split([c.num_tokens for c in chunks])
            for chunk, logits in zip(chunks, rows, strict=True):
                place = sequences.index(chunk.sequence)
                targets = torch.tensor(windows[place][chunk.start + 1 : chunk.stop + 1])
                scores[place].add(logits, chunk.start, targets)
                chunk.sequence.num_computed_tokens = chunk.stop

    def _steps(self, sequences: list[Sequence]) -> Iterator[list[Chunk]]:
        """Prompts one after the other, then one token of each at a time."""
        block = self._runner.block_size
        most = min(
            self._engine.settings.max_step_tokens, _MAX_LOGITS // self._engine.tokenizer.vocab_size
        )
        most = max(block, most // block * block)
        for sequence in sequences:
            for start in range(0, sequence.num_prompt_tokens, most):
                yield [Chunk(sequence, start, min(most, sequence.num_prompt_tokens - start))]
        for _ in range(len(sequences[0].output_ids)):
            yield [Chunk(sequence, sequence.num_computed_tokens, 1) for sequence in sequences]


def _forced(ids: list[int], method: SparseAttentionMethod, num_decoded: int, slot: int) -> Sequence:
    """A sequence whose every token is given; the window's last one is only predicted."""
    stop = len(ids) - 1
    return Sequence(
        request_id="evaluate",
        prompt_ids=ids[: stop - num_decoded],
        method=method,
        sampling=SamplingParams(),
        generator=torch.Generator(),
        output_ids=ids[stop - num_decoded : stop],
        slot=slot,
    )


def _finishes(updates: dict[Sequence, Update]) -> Iterator[tuple[Sequence, Any]]:
    for sequence, update in updates.items():
        if update.error is not None:
            raise update.error
        if update.finish is not None:
            yield sequence, update.finish
