"""The engine against transformers on this machine, in one process and with one thread.

Two questions: how many new tokens per second come out of a mixed load, and how long a long prompt
waits for its first token. Every contender gets the same weights, prompts and output lengths; the
rounds alternate, and the median round counts.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
import typer

from benchmarks.report import save
from service.engine.engine import Engine
from service.engine.events import NoEvents
from service.engine.generation import build_sequence
from service.engine.sequence import SamplingParams, Sequence, Update
from service.models.bridge import NAME
from service.models.loading import LoadedModel, default_model_directory, load_model
from service.settings import Settings
from sparse_methods import get_sparse_method

_NUM_REQUESTS = 24
# By default it allocates its cache from all free memory, anew for each call; of three sizes tried
# this one was its fastest.
_PEER_CONFIG = transformers.ContinuousBatchingConfig(
    num_blocks=64, page_size=128, max_batch_tokens=512
)
# Methods that keep needles and bits per byte at this length (docs/methods.md), selection included.
_UNHARMED = ("flashprefill", "xattention")
Work = list[tuple[list[int], int]]  # prompt, new tokens


def main(
    rounds: int = 5,
    long_prompt_rounds: int = 1,
    long_prompt_tokens: int = 16000,
    threads: int = 1,
    *,
    write: bool = True,
) -> None:
    """Run both benchmarks and print ratios first."""
    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    loaded = load_model(None, "cpu", "float32")
    engine = Engine(Settings(method="dense", max_running_requests=32), loaded, NoEvents())
    results = {
        "throughput": throughput(engine, loaded, rounds),
        "first_token": first_token(engine, loaded, long_prompt_tokens, long_prompt_rounds),
    }
    for name, result in results.items():
        print(f"\n{name}")
        for key, value in result.items():
            print(f"  {key:58s} {value:10.3f}")
    if write:
        print(f"\nwritten to {save('engine-cpu', results)}")


def throughput(engine: Engine, loaded: LoadedModel, rounds: int) -> dict[str, float]:
    """New tokens per second of a mixed load, greedy, everything submitted at once."""
    work = _mixed_work(engine.tokenizer.vocab_size)
    num_new = sum(length for _, length in work)
    seconds = _alternate(
        {
            "ours, dense": lambda: _run_ours(engine, work, "dense"),
            "ours, flash_skip_softmax": lambda: _run_ours(engine, work, "flash_skip_softmax"),
            "transformers generate, padded": lambda: _run_padded(loaded, work),
            "transformers continuous batching": lambda: _run_continuous(loaded, work),
        },
        rounds,
    )
    rate = {name: num_new / value for name, value in seconds.items()}
    best_peer = max(rate["transformers generate, padded"], rate["transformers continuous batching"])
    return {
        "ratio: ours dense / better of the two (goal >= 1.3)": rate["ours, dense"] / best_peer,
        **{f"{name}, new tokens/s": value for name, value in rate.items()},
    }


def first_token(
    engine: Engine, loaded: LoadedModel, num_tokens: int, rounds: int
) -> dict[str, float]:
    """Seconds to the first token of one long prompt, a book's."""
    text = (default_model_directory() / "calibration_text.txt").read_text()
    prompt = engine.tokenizer.encode(text)[:num_tokens]

    def ours(method: str) -> Callable[[], None]:
        return lambda: _run_ours(engine, [(prompt, 1)], method)

    seconds = _alternate(
        {f"ours, {name}": ours(name) for name in ("dense", "streaming", *_UNHARMED)}
        | {"transformers generate": lambda: _run_padded(loaded, [(prompt, 1)])},
        rounds,
    )
    dense = seconds["ours, dense"]
    best = min(seconds[f"ours, {name}"] for name in _UNHARMED)
    return {
        "ratio: dense / streaming (goal >= 3)": dense / seconds["ours, streaming"],
        "ratio: dense / best of unharmed quality (goal >= 3)": dense / best,
        "ratio: transformers / dense (goal >= 1)": seconds["transformers generate"] / dense,
        **{f"{name}, s": value for name, value in seconds.items()},
    }


def _mixed_work(vocab_size: int) -> Work:
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int, count: int) -> list[int]:
        return torch.randint(low, high, (count,), generator=generator).tolist()

    lengths = zip(draw(16, 257, _NUM_REQUESTS), draw(8, 65, _NUM_REQUESTS), strict=True)
    return [(draw(8, vocab_size, num_prompt), num_new) for num_prompt, num_new in lengths]


def _alternate(contenders: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each contender, in turns so that a drifting machine hits all alike."""
    for run in contenders.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            started_at = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started_at)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _run_ours(engine: Engine, work: Work, method: str) -> None:
    core = engine.core
    sequences = []
    for prompt, num_new in work:
        sampling = SamplingParams(temperature=0, max_tokens=num_new, ignore_eos=True)
        sequences.append(build_sequence("bench", prompt, get_sparse_method(method)(), sampling, 0))
        core.add(sequences[-1])
    while core.has_work:
        _raise_errors(core.step())
    expected = [num_new for _, num_new in work]
    assert [len(sequence.output_ids) for sequence in sequences] == expected  # noqa: S101


def _raise_errors(updates: dict[Sequence, Update]) -> None:
    for update in updates.values():
        if update.error is not None:
            raise update.error


@contextmanager
def _plain(loaded: LoadedModel, attention: str) -> Iterator[Any]:
    """The same model object with its own modules under transformers' own attention."""
    loaded.model.set_attn_implementation(attention)
    try:
        with loaded.fusions.suspended():
            yield loaded.model
    finally:
        loaded.model.set_attn_implementation(NAME)


def _run_padded(loaded: LoadedModel, work: Work) -> None:
    longest = max(len(prompt) for prompt, _ in work)
    pads = [longest - len(prompt) for prompt, _ in work]
    ids = torch.tensor([[0] * pad + prompt for pad, (prompt, _) in zip(pads, work, strict=True)])
    mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads])
    num_new = max(length for _, length in work)
    with _plain(loaded, "sdpa") as model, torch.inference_mode():
        model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=num_new,
            min_new_tokens=num_new,
            do_sample=False,
            pad_token_id=0,
        )


def _run_continuous(loaded: LoadedModel, work: Work) -> None:
    # Its buffers outlive a call, so inference mode, which would freeze them, is not an option.
    with _plain(loaded, "sdpa") as model, torch.no_grad():
        config = transformers.GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        with model.continuous_batching_context_manager(
            generation_config=config, continuous_batching_config=_PEER_CONFIG
        ) as manager:
            for index, (prompt, num_new) in enumerate(work):
                manager.add_request(prompt, request_id=str(index), max_new_tokens=num_new)
            for _ in work:
                manager.get_result()


if __name__ == "__main__":
    typer.run(main)
