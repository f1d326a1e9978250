"""What a long prompt does to those who decode beside it: time between their tokens, and its own.

Some sequences decode alone, then beside one long prompt that is computed: with several bounds on
the seconds that prompts may take of a step, the last of which bounds nothing. All of it goes
through the engine's own steps, in one process. Prompts longer than the built-in model's context
need ``--random-layers``: weights that mean nothing, but take 131,200 tokens.
"""

import time
from dataclasses import dataclass, field

import torch
import typer

from benchmarks.llama import SHAPE, build_model
from benchmarks.report import save
from service.engine.core import EngineCore
from service.engine.engine import Engine
from service.engine.events import NoEvents
from service.engine.generation import build_sequence
from service.engine.sequence import SamplingParams, Sequence, Update
from service.models.loading import LoadedModel, default_model_directory, load_model
from service.settings import Settings
from sparse_methods import get_sparse_method

_WARM_UP_STEPS = 4
_SMALL_SHAPE = SHAPE | {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 4096,
}


@dataclass
class Gaps:
    """Seconds between two tokens of a sequence, of all that decode."""

    seconds: list[float] = field(default_factory=list)
    last_at: dict[Sequence, float] = field(default_factory=dict)

    def note(self, updates: dict[Sequence, Update]) -> None:
        """Take the tokens of a step."""
        now = time.perf_counter()
        for sequence, update in updates.items():
            if update.token_ids and sequence in self.last_at:
                self.seconds.append(now - self.last_at[sequence])
            if update.token_ids:
                self.last_at[sequence] = now

    def quantile(self, share: float) -> float:
        """Seconds that this share of the gaps stays within."""
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def main(  # noqa: PLR0913 - each is an option of the command line
    long_prompt_tokens: int = 15000,
    decoding: int = 8,
    bounds: str = "0.01,0.05,0.2,1000",
    method: str = "dense",
    threads: int = 1,
    random_layers: int = 0,
    *,
    write: bool = True,
) -> None:
    """Measure with each bound on the seconds of prompts beside decoding sequences.

    With ``random_layers`` the model has so many: of an 8B model on a GPU, small ones on a CPU.
    """
    torch.set_num_threads(threads)
    loaded = _random_model(random_layers) if random_layers else load_model(None, "auto", "auto")
    setting: dict[str, float] = {
        "prompt, tokens": long_prompt_tokens,
        "decoding": decoding,
        "layers of random weights": random_layers,
    }
    results = {"setting": setting}
    for bound in map(float, bounds.split(",")):
        results[f"max_prefill_s {bound:g}"] = _measure(
            loaded, bound, long_prompt_tokens, decoding, method
        )
    for name, result in results.items():
        print(f"\n{name}")
        for key, value in result.items():
            print(f"  {key:58s} {value:10.4f}")
    if write:
        device = "gpu" if torch.cuda.is_available() else "cpu"
        name = f"fairness-{long_prompt_tokens // 1000}k-{device}"
        print(f"\nwritten to {save(name, results)}")


def _random_model(num_layers: int) -> LoadedModel:
    if torch.cuda.is_available():
        return build_model(num_layers)
    return build_model(num_layers, shape=_SMALL_SHAPE, device="cpu")


def _measure(
    loaded: LoadedModel, bound: float, num_tokens: int, num_decoding: int, method: str
) -> dict[str, float]:
    settings = Settings(
        method="dense", max_prefill_s=bound, max_step_tokens=2048, prefix_caching=False
    )
    engine = Engine(settings, loaded, NoEvents())
    text = (default_model_directory() / "calibration_text.txt").read_text()
    book = engine.tokenizer.encode(text)
    book *= -(-num_tokens // len(book))
    core = engine.core
    _prefill_alone(core, book[:num_tokens], method)  # compiles and captures, on a GPU
    alone_s = _prefill_alone(core, book[:num_tokens], method)
    beside = [
        _sequence(book[100 * i : 100 * i + 200], method, 100_000) for i in range(num_decoding)
    ]
    for sequence in beside:
        core.add(sequence)
    _steps(core, Gaps(), num_decoding + _WARM_UP_STEPS)
    alone, crowded = Gaps(), Gaps()
    _steps(core, alone, 120)
    long = _sequence(book[:num_tokens], method, 2)
    core.add(long)
    started_at = time.perf_counter()
    crowded.last_at = dict(alone.last_at)
    while not long.output_ids:
        crowded.note({s: u for s, u in core.step().items() if s is not long})
    first_token_s = time.perf_counter() - started_at
    for sequence in [long, *beside]:
        core.abort(sequence, "client")
    while core.has_work:
        core.step()
    return {
        "ratio: p99 gap between tokens, beside the prompt / without": crowded.quantile(0.99)
        / alone.quantile(0.99),
        "ratio: time to the prompt's first token, beside / alone": first_token_s / alone_s,
        "p50 gap without, s": alone.quantile(0.5),
        "p99 gap without, s": alone.quantile(0.99),
        "p50 gap beside, s": crowded.quantile(0.5),
        "p99 gap beside, s": crowded.quantile(0.99),
        "longest gap beside, s": max(crowded.seconds),
        "first token of the prompt alone, s": alone_s,
        "first token of the prompt beside, s": first_token_s,
    }


def _sequence(prompt: list[int], method: str, max_tokens: int) -> Sequence:
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    return build_sequence("fairness", prompt, get_sparse_method(method)(), sampling, 0)


def _prefill_alone(core: EngineCore, prompt: list[int], method: str) -> float:
    sequence = _sequence(prompt, method, 1)
    core.add(sequence)
    started_at = time.perf_counter()
    while core.has_work:
        core.step()
    return time.perf_counter() - started_at


def _steps(core: EngineCore, gaps: Gaps, count: int) -> None:
    for _ in range(count):
        gaps.note(core.step())


if __name__ == "__main__":
    typer.run(main)
