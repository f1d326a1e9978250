"""From which length on a method is faster than dense attention, here, with the built-in model.

``python -m benchmarks.break_even``: one thread; per length the contenders alternate, and the
median round counts. A prompt's first token decides for methods that select while prefilling, a
decode step for the others. The shortest length from which on the ratio stays above 1 is what a
method's ``measured_break_even`` should say.
"""

import statistics
import time
from collections.abc import Callable

import torch
import typer

from benchmarks.report import save
from service.engine.engine import Engine
from service.engine.events import NoEvents
from service.engine.generation import build_sequence
from service.engine.sequence import SamplingParams
from service.models.loading import default_model_directory, load_model
from service.settings import Settings
from sparse_methods import Phase, get_sparse_method, list_sparse_methods

_NUM_STEPS = 8  # decode steps that are averaged


def main(
    lengths: str = "512,1024,2048,4096",
    methods: str = "",
    rounds: int = 3,
    threads: int = 1,
    *,
    write: bool = True,
) -> None:
    """Print the ratio dense / method for every method, or those named, and every length."""
    torch.set_num_threads(threads)
    engine = Engine(Settings(method="dense"), load_model(None, "cpu", "float32"), NoEvents())
    text = (default_model_directory() / "calibration_text.txt").read_text()
    tokens = engine.tokenizer.encode(text)
    every = [name for name in list_sparse_methods() if not get_sparse_method(name).evaluation_only]
    names = ["dense", *methods.split(",")] if methods else every
    results: dict[str, dict[int, float]] = {name: {} for name in names}
    for length in map(int, lengths.split(",")):
        seconds = {name: _seconds(engine, name, tokens[:length]) for name in names}
        for _ in range(rounds - 1):
            for name in names:
                seconds[name] += _seconds(engine, name, tokens[:length])
        dense = [statistics.median(column) for column in zip(*seconds["dense"], strict=True)]
        for name in names:
            phase = _deciding_phase(name)
            own = statistics.median(pair[phase] for pair in seconds[name])
            results[name][length] = dense[phase] / own
            print(f"{length:7d} {name:22s} {results[name][length]:6.2f}", flush=True)
    if write:
        print(f"written to {save('break-even-cpu', results)}")


def _deciding_phase(name: str) -> int:
    """0 for the first token, 1 for a decode step."""
    return int(Phase.PREFILL not in get_sparse_method(name).phases and name != "dense")


def _seconds(engine: Engine, name: str, prompt: list[int]) -> list[tuple[float, float]]:
    """Seconds to the first token, and of a decode step."""
    cls = get_sparse_method(name)
    knobs = {"dense_below": 0} if "dense_below" in cls.Knobs.model_fields else {}
    sampling = SamplingParams(temperature=0, max_tokens=_NUM_STEPS + 1, ignore_eos=True)
    engine.core.add(build_sequence("bench", prompt, cls(knobs), sampling, 0))
    now: Callable[[], float] = time.perf_counter
    started_at, first_at = now(), 0.0
    while engine.core.has_work:
        updates = engine.core.step()
        if updates and not first_at:
            first_at = now()
    return [(first_at - started_at, (now() - first_at) / _NUM_STEPS)]


if __name__ == "__main__":
    typer.run(main)
