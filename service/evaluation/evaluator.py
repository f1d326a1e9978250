"""Measures method after method, length after length."""

import dataclasses
import datetime
import hashlib
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers

from service.engine.engine import Engine
from service.engine.sequence import SamplingParams
from service.evaluation.driver import EngineDriver, Output
from service.evaluation.haystack import Haystack, read_haystack, sample_haystack
from service.evaluation.results import Cell, Results
from service.evaluation.specs import MethodSpec
from service.models.calibration_file import FILE_NAME, fingerprint
from sparse_methods import get_sparse_method
from sparse_methods.evaluation.agreement import WindowScores, text_measures
from sparse_methods.evaluation.intervals import Estimate, mean, proportion
from sparse_methods.evaluation.tasks import COPY, Task, TaskWriter, make_tasks
from sparse_methods.statistics import RequestStatistics
from sparse_methods.views import Phase

_LENGTHS_WRITTEN = 2  # a haystack that the model writes is so many times the longest prompt


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        lengths: Tokens of a prompt with its answer, or of a window of text.
        num_samples: Prompts of each task.
        num_windows: Windows of text.
        num_decoded: Last tokens of a window, decoded one by one.
        text: File of text; None lets the model write some.
    """

    specs: list[MethodSpec]
    lengths: list[int]
    num_samples: int = 40
    num_windows: int = 8
    num_decoded: int = 64
    seed: int = 0
    text: Path | None = None

    @property
    def num_parts(self) -> int:
        """Cells to be measured."""
        return len(self.specs) * len(self.lengths)


class Evaluator:
    """Measures the cells of a plan on one engine.

    Raises:
        ValueError: The plan does not fit the model or the text.
        OSError: The text cannot be read.
    """

    def __init__(self, engine: Engine, model_directory: Path, plan: Plan) -> None:
        self._engine, self._directory, self._plan = engine, model_directory, plan
        longest = max(plan.lengths)
        if longest > engine.max_context_tokens:
            raise ValueError(
                f"A length of {longest} tokens is beyond the context of"
                f" {engine.max_context_tokens}; lower it or raise kv_cache_bytes."
            )
        if min(plan.lengths) < 2 * plan.num_decoded:
            raise ValueError(f"A length below {2 * plan.num_decoded} tokens leaves no prompt.")
        self._specs = [
            dataclasses.replace(spec, method=engine.calibrated(spec.method)) for spec in plan.specs
        ]
        for spec in self._specs:
            spec.method.check_servable(engine.settings.block_size)
        # Of the code that was loaded; its files may be edited while a long evaluation runs.
        self._hashes = [spec.method.content_hash() for spec in self._specs]
        self._driver = EngineDriver(engine)
        self._opening = engine.tokenizer.encode("")
        self._tasks = cache(self._make_tasks)
        self._dense_windows = cache(self._read_dense)

    def run(self, results: Results, progress: Callable[[int, int], None]) -> list[Cell]:
        """Measure what ``results`` lacks; return the cells of the plan.

        ``progress`` is called with (done, total) before the first cell and after each.
        """
        cells = []
        progress(0, self._plan.num_parts)
        for length in self._plan.lengths:
            for spec, content_hash in zip(self._specs, self._hashes, strict=True):
                identity = _identity(spec, length, content_hash)
                cell = results.find(identity)
                if cell is None:
                    cell = identity | self._measure(spec, length)
                    results.add(cell)
                cells.append(cell)
                progress(len(cells), self._plan.num_parts)
            self._tasks.cache_clear()
            self._dense_windows.cache_clear()
        return cells

    def conditions(self) -> dict[str, Any]:
        """What must be equal for two cells to be compared."""
        plan, engine = self._plan, self._engine
        calibration = engine.settings.calibration or self._directory / FILE_NAME
        return {
            "model": engine.model_name,
            "model_fingerprint": fingerprint(self._directory),
            "calibration": _digest(calibration),
            "dtype": engine.dtype,
            "device": engine.device,
            "attention": engine.attention,
            "block_size": engine.settings.block_size,
            "haystack": self._haystack.source,
            "samples": plan.num_samples,
            "windows": plan.num_windows,
            "decoded": plan.num_decoded,
            "seed": plan.seed,
        }

    def environment(self) -> dict[str, Any]:
        """What a reader needs to judge a time."""
        is_cuda = self._engine.device.startswith("cuda")
        return {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "hardware": torch.cuda.get_device_name() if is_cuda else platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "max_step_tokens": self._engine.settings.max_step_tokens,
        }

    def _measure(self, spec: MethodSpec, length: int) -> Cell:
        """Everything about one method at one length."""
        tasks = self._tasks(length)
        fallback = spec.method.fallback(length)
        cell: Cell = {"fallback": None if fallback is None else fallback.reason}
        asked = {name: group for name, group in tasks.items() if name != COPY}
        cell |= self._answers(spec, asked)
        cell |= self._copies(spec, tasks[COPY])
        cell |= self._text(spec, length)
        cell |= self._driver.time(next(iter(tasks.values()))[0].prompt, spec.method)
        return cell

    def _answers(self, spec: MethodSpec, tasks: dict[str, list[Task]]) -> Cell:
        """Share of answers that greedy decoding gives exactly, by task; and what was read."""
        cell: Cell = {}
        flat = [task for group in tasks.values() for task in group]
        samplings = [
            SamplingParams(temperature=0, max_tokens=len(task.answer), ignore_eos=True)
            for task in flat
        ]
        outputs = self._driver.generate([task.prompt for task in flat], spec.method, samplings)
        pairs = iter(zip(flat, outputs, strict=True))
        for name, group in tasks.items():
            is_right = [out.token_ids == task.answer for task, out in islice(pairs, len(group))]
            cell[name] = _as_json(proportion(sum(is_right), len(group)))
        return cell | _counts(flat, outputs)

    def _copies(self, spec: MethodSpec, tasks: list[Task]) -> Cell:
        """Share of a copied span's tokens that are the most likely ones, each given the last."""
        windows = [[*task.prompt, *task.answer] for task in tasks]
        num_new = len(tasks[0].answer)
        found = self._driver.read_windows(windows, spec.method, num_new, keeps_distributions=False)
        shares = [
            (scores.joined().choices[-num_new:] == torch.tensor(task.answer)).float().mean().item()
            for task, scores in zip(tasks, found, strict=True)
        ]
        return {COPY: _as_json(mean(shares))}

    def _text(self, spec: MethodSpec, length: int) -> Cell:
        dense = self._dense_windows(length)
        probe = self._driver.probe
        probe.reset()
        probe.is_active = True
        ours = self._driver.read_windows(self._windows(length), spec.method, self._plan.num_decoded)
        probe.is_active = False
        per_byte = self._haystack.bytes_per_token
        pairs = zip(ours, dense, strict=True)
        found = [text_measures(a, b, per_byte or 1.0) for a, b in pairs]
        names = [name for name in found[0] if per_byte is not None or "bits_per_byte" not in name]
        cell: Cell = {name: _as_json(mean([window[name] for window in found])) for name in names}
        return cell | {f"{phase}_recall": probe.recall(phase) for phase in Phase}

    @cached_property
    def _haystack(self) -> Haystack:
        if self._plan.text is None:
            num_tokens = _LENGTHS_WRITTEN * max(self._plan.lengths)
            return sample_haystack(self._driver, self._opening, num_tokens, self._plan.seed)
        return read_haystack(self._plan.text, self._encode)

    def _encode(self, text: str) -> list[int]:
        return self._engine.tokenizer.encode(text)[len(self._opening) :]

    def _make_tasks(self, length: int) -> dict[str, list[Task]]:
        writer = TaskWriter(self._encode, self._haystack.token_ids, self._opening)
        return make_tasks(writer, length, self._plan.num_samples, self._plan.seed)

    def _windows(self, length: int) -> list[list[int]]:
        return self._haystack.windows(self._opening, length, self._plan.num_windows)

    def _read_dense(self, length: int) -> list[WindowScores]:
        dense = get_sparse_method("dense")()
        return self._driver.read_windows(self._windows(length), dense, self._plan.num_decoded)


def _digest(path: Path) -> str | None:
    """Short digest of a file, if it exists."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.exists() else None


def _identity(spec: MethodSpec, length: int, content_hash: str) -> Cell:
    method = type(spec.method)
    return {
        "label": spec.label,
        "method": method.registered_name,
        "version": method.registered_version,
        "knobs": spec.knobs,
        "length": length,
        "content_hash": content_hash,
    }


def _counts(tasks: list[Task], outputs: list[Output]) -> Cell:
    read = sum((output.finish.statistics for output in outputs), RequestStatistics())
    return {
        "prefill_density": read.phase(Phase.PREFILL).density,
        "decode_density": read.phase(Phase.DECODE).density,
        "prompt_tokens": sum(len(task.prompt) for task in tasks),
        "generated_tokens": sum(len(output.token_ids) for output in outputs),
    }


def _as_json(estimate: Estimate) -> dict[str, float | int | None]:
    return dataclasses.asdict(estimate)
