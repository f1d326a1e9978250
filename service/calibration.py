"""Run a model densely over long texts, and fit what every trial threshold would have skipped."""

import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from service.engine.kv_cache import PageAllocator
from service.engine.model_runner import ModelRunner
from service.engine.scheduler import Chunk
from service.engine.sequence import SamplingParams
from service.engine.sequence import Sequence as Generation
from service.models.calibration_file import fingerprint
from service.models.hugging_face import Progress
from service.models.loading import LoadedModel
from sparse_methods import (
    Phase,
    SparseAttentionMethod,
    get_sparse_method,
    list_sparse_methods,
)
from sparse_methods.calibration.artifact import CalibrationArtifact, MethodCalibration
from sparse_methods.calibration.fit import TRIAL_THRESHOLDS, Observation, fit_phase
from sparse_methods.calibration.observe import count_skipped
from sparse_methods.errors import UnsupportedError
from sparse_methods.kernels.operation import AttentionInputs, count_selected

NUM_DECODED = 64  # tokens at the end of each text that are computed as generated ones
_CHUNK_TOKENS = 1024
_NUM_FACTS = 4
_NAMES = ("silver harbour", "quiet meadow", "iron lantern", "hollow river", "amber tower")

Encode = Callable[[str], list[int]]
MethodClass = type[SparseAttentionMethod]


@dataclass(frozen=True)
class CalibrationText:
    """Tokens to observe: a prompt, and what follows it as if it had been generated."""

    prompt_ids: list[int]
    output_ids: list[int]


def calibratable(name: str | None) -> list[MethodClass]:
    """The versions of a method, or of all, that know a target sparsity.

    Raises:
        SparseMethodError: The method is unknown, or none of its versions does.
    """
    versions = list_sparse_methods()
    names = list(versions) if name is None else [get_sparse_method(name).registered_name]
    classes = [get_sparse_method(n, version) for n in names for version in versions[n]]
    found = [cls for cls in classes if cls.has_target_sparsity]
    if not found:
        raise UnsupportedError(f"Method {name!r} has no target sparsity to calibrate.")
    return found


def planted_texts(encode: Encode, text: str, lengths: Sequence[int]) -> list[CalibrationText]:
    """Cut one text after the other from ``text``, with facts planted and the last one asked for.

    Attention to something far away must be among what is observed; plain prose has little of it.

    Raises:
        ValueError: The text is too short.
    """
    token_ids, rng = encode(text), np.random.default_rng(0)
    start_ids = encode("")  # what the tokenizer puts before every text
    needed = sum(lengths) + len(lengths) * NUM_DECODED
    if len(token_ids) < needed:
        raise ValueError(f"The text has {len(token_ids)} tokens; {needed} are needed.")
    texts, position = [], len(start_ids)
    for length in lengths:
        facts, question = _facts(encode, rng, len(start_ids))
        body = token_ids[position : position + length + NUM_DECODED]
        room = length - len(start_ids) - len(question) - sum(map(len, facts))
        if room < length // 2:
            raise ValueError(f"A prompt of {length} tokens is too short to calibrate with.")
        cuts = [round(room * (index + 0.5) / len(facts)) for index in range(len(facts))]
        prompt, before = list(start_ids), 0
        for cut, fact in zip(cuts, facts, strict=True):
            prompt += body[before:cut] + fact
            before = cut
        prompt += body[before:room] + question
        texts.append(CalibrationText(prompt, body[room : room + NUM_DECODED]))
        position += length
    return texts


def _facts(
    encode: Encode, rng: np.random.Generator, num_start: int
) -> tuple[list[list[int]], list[int]]:
    """Tokens of sentences that plant facts, and of a question for one of them."""
    names = rng.permutation(_NAMES)[:_NUM_FACTS]
    numbers = rng.integers(1_000_000, 10_000_000, _NUM_FACTS)
    sentences = [
        f"\nThe special magic number for {name} is: {number}.\n"
        for name, number in zip(names, numbers, strict=True)
    ]
    asked = int(rng.integers(_NUM_FACTS))
    question = f"\nWhat is the special magic number for {names[asked]}?" + sentences[asked][:-1]
    return [encode(sentence)[num_start:] for sentence in sentences], encode(question)[num_start:]


def calibrate(
    loaded: LoadedModel,
    methods: Sequence[MethodClass],
    texts: Sequence[CalibrationText],
    block_size: int,
    progress: Progress | None = None,
) -> CalibrationArtifact:
    """Observe the texts under dense attention and fit each method; binds ``loaded`` to its cache.

    Raises:
        CalibrationError: The texts do not determine a fit.
    """
    observer = _Observer(len(loaded.layers), methods, loaded.model.device)
    longest = max(len(text.prompt_ids) + len(text.output_ids) for text in texts)
    runner = ModelRunner(
        loaded.model,
        [(layer.module, layer.geometry) for layer in loaded.layers],
        num_pages=-(-longest // block_size),
        block_size=block_size,
        num_slots=1,
    )
    runner.attention.observe(observer)
    total, done = sum(len(text.prompt_ids) + len(text.output_ids) for text in texts), 0
    for text in texts:
        for num_tokens in _run(runner, text):
            done += num_tokens
            if progress is not None:
                progress("calibration", done, total)
        observer.end_text(text)
    return CalibrationArtifact(
        model=loaded.name,
        model_fingerprint=fingerprint(loaded.directory),
        library_versions={
            name: importlib.metadata.version(name) for name in ("torch", "transformers", "scipy")
        },
        prompt_lengths=tuple(len(text.prompt_ids) for text in texts),
        methods=tuple(
            MethodCalibration(
                method=cls.registered_name,
                version=cls.registered_version,
                block_size=block_size,
                phases={phase: fit_phase(observer.of(cls, phase)) for phase in cls.phases},
            )
            for cls in methods
        ),
    )


def _run(runner: ModelRunner, text: CalibrationText) -> Iterator[int]:
    """Compute a text step by step; yields how many tokens each took."""
    sequence = Generation(
        request_id="calibration",
        prompt_ids=text.prompt_ids,
        method=get_sparse_method("dense")(),
        sampling=SamplingParams(),
        generator=torch.Generator(),
        output_ids=text.output_ids,
    )
    allocator = PageAllocator(runner.num_pages, runner.block_size)
    while sequence.num_uncomputed_tokens:
        start, end = sequence.num_computed_tokens, sequence.num_prompt_tokens
        # A step computes prompt or generated tokens; each of the latter is a tile of its own.
        num_tokens = min(_CHUNK_TOKENS, end - start if start < end else len(text.output_ids))
        if not allocator.try_reserve(sequence, num_tokens):
            raise MemoryError("the KV cache is too small for a calibration text")
        runner.run_all_logits([Chunk(sequence, start, num_tokens)])
        sequence.num_computed_tokens += num_tokens
        yield num_tokens


class _Observer:
    """Called before each attention layer; adds up what each trial threshold would skip."""

    def __init__(
        self, num_layers: int, methods: Sequence[MethodClass], device: torch.device
    ) -> None:
        self._num_layers = num_layers
        self._orders = {cls().visits_diagonal_first(phase) for cls in methods for phase in Phase}
        self._log_thresholds = torch.tensor(TRIAL_THRESHOLDS, device=device).log()
        self._observations: dict[tuple[bool, Phase], list[Observation]] = {}
        self._num_calls = 0
        self._begin_text()

    def _begin_text(self) -> None:
        num_trials = len(TRIAL_THRESHOLDS)
        self._skipped = {
            (order, phase): np.zeros((self._num_layers, num_trials))
            for order in self._orders
            for phase in Phase
        }
        self._total = {phase: np.zeros(self._num_layers) for phase in Phase}

    def __call__(self, inputs: AttentionInputs) -> None:
        layer = self._num_calls % self._num_layers
        self._num_calls += 1
        phase = Phase.DECODE if inputs.tiles.tiles[0].is_decode else Phase.PREFILL
        self._total[phase][layer] += int(count_selected(inputs)[0][..., 0].sum())
        for order in self._orders:
            skipped, _ = count_skipped(inputs, self._log_thresholds, diagonal_first=order)
            self._skipped[order, phase][layer] += skipped.sum(0).cpu().numpy()

    def end_text(self, text: CalibrationText) -> None:
        """Keep what was counted since the text before."""
        lengths = {
            Phase.PREFILL: len(text.prompt_ids),
            Phase.DECODE: len(text.prompt_ids) + len(text.output_ids) // 2,
        }
        for (order, phase), skipped in self._skipped.items():
            observation = Observation(lengths[phase], skipped, self._total[phase])
            self._observations.setdefault((order, phase), []).append(observation)
        self._begin_text()

    def of(self, cls: MethodClass, phase: Phase) -> list[Observation]:
        """What was observed in the visiting order of a method."""
        return self._observations[cls().visits_diagonal_first(phase), phase]
