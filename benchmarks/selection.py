"""Deciding what to read, in one layer on a GPU: the kernels of selection against the eager rules.

Prompts: milliseconds of ``select_prefill``, lists included. Decoding: microseconds of
``select_decode``, captured in a CUDA graph and replayed. Queries and keys are random, so how much
is read means nothing here; how many lists the two decide otherwise does, as sums are rounded
otherwise.
"""

import statistics
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import typer

from benchmarks.report import save
from sparse_methods import get_sparse_method
from sparse_methods.kernels import selection
from sparse_methods.views import (
    BlockSelection,
    DecodeView,
    PageSelection,
    PageSummaries,
    PrefillView,
)

_HEADS, _KV_HEADS, _DIM, _PAGE = 32, 8, 128, 128  # as Llama 3.1 8B has them
_LENGTHS = (8192, 32768, 131072)
_STEPS = ((8, 32768), (1, 131072))
_PREFILL = (
    "block_topk",
    "flashprefill",
    "xattention",
    "predictive_skip",
    "vertical_slash",
    "flexprefill",
)
_DECODE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("quest", {"budget_pages": 32}),
    ("quest", {"budget_pages": 32, "top_p": None}),
)
_SLOW = 2.0  # seconds, for which a contender is timed at most
Lists = BlockSelection | PageSelection
Run = Callable[[], Lists | None]


def main(*, quick: bool = False, write: bool = True) -> None:
    """Run the comparisons and print ratios first.

    Args:
        quick: Leave out the longest prompt.
        write: Save the results as JSON.
    """
    if not torch.cuda.is_available():
        print("This benchmark needs a CUDA device.")
        raise typer.Exit(2)
    results: dict[str, Any] = {"device": torch.cuda.get_device_name()}
    for length in _LENGTHS[:2] if quick else _LENGTHS:
        view = prompt(length)
        for name in _PREFILL:
            method = get_sparse_method(name)()
            run = lambda method=method, view=view: method.select_prefill(view)  # noqa: E731
            _report(results, f"{name}, prompt of {length}", compare(run, _milliseconds, "ms"))
    for num_rows, length in _STEPS:
        rows = step(num_rows, length)
        for name, knobs in _DECODE:
            method = get_sparse_method(name)(knobs)
            run = lambda method=method, rows=rows: method.select_decode(rows)  # noqa: E731
            label = f"{name} {knobs}, {num_rows} x {length}"
            _report(results, label, compare(run, _microseconds_captured, "us"))
    if write:
        print(f"\nwritten to {save('selection', results)}")


def compare(run: Run, measure: Callable[[Run], float], unit: str) -> dict[str, float]:
    """Times of both ways to decide, in this order, and how many lists differ."""
    kernel_lists, kernels = run(), measure(run)
    with mock.patch.object(selection, "has_kernels", return_value=False):
        eager_lists, eager = run(), measure(run)
    if kernel_lists is None or eager_lists is None:
        raise ValueError("a method that reads everything decides nothing")
    differs = (_table(kernel_lists) != _table(eager_lists)).any(-1)
    return {
        "ratio: eager / kernels, time": eager / kernels,
        unit: kernels,
        f"eager, {unit}": eager,
        "share of lists that differ": differs.float().mean().item(),
    }


def prompt(length: int) -> PrefillView:
    """One whole prompt of random rows on shuffled pages."""
    torch.manual_seed(0)
    num_pages = length // _PAGE
    keys = _randn(num_pages, _PAGE, _KV_HEADS, _DIM)
    return PrefillView(
        query=_randn(length, _HEADS, _DIM),
        keys=keys,
        pages=torch.randperm(num_pages, device="cuda"),
        position=0,
        prompt_len=length,
        scale=_DIM**-0.5,
        block_size=_PAGE,
        layer=0,
        num_layers=32,
        summaries=_summarise(keys),
    )


def step(num_rows: int, length: int) -> DecodeView:
    """Rows that each see ``length`` keys on shuffled pages."""
    torch.manual_seed(0)
    num_pages = length // _PAGE
    keys = _randn(num_rows * num_pages, _PAGE, _KV_HEADS, _DIM)
    lengths = torch.full((num_rows,), length, dtype=torch.int32, device="cuda")
    return DecodeView(
        query=_randn(num_rows, _HEADS, _DIM),
        keys=keys,
        pages=torch.randperm(num_rows * num_pages, device="cuda").view(num_rows, num_pages),
        kv_lens=lengths,
        prompt_lens=lengths,
        scale=_DIM**-0.5,
        layer=0,
        num_layers=32,
        summaries=_summarise(keys),
    )


def _randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def _summarise(keys: torch.Tensor) -> PageSummaries:
    return PageSummaries(keys.amin(1), keys.amax(1), keys.sum(1, dtype=torch.float32))


def _table(lists: Lists) -> torch.Tensor:
    """[N, Hkv, M] bool, what is read."""
    indices, counts = lists.indices.long(), lists.counts
    in_use = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    num_blocks = int(indices.max()) + 1 if lists.indices.shape[-1] else 0
    width = max(num_blocks, max(_LENGTHS) // _PAGE)
    table = torch.zeros(*counts.shape, width, dtype=torch.int32, device=indices.device)
    return table.scatter_add(-1, indices, in_use.int()) > 0


def _milliseconds(run: Run) -> float:
    return _time(run, repeats=1) * 1e3


def _microseconds_captured(run: Run) -> float:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lists = run()  # kept, as the graph writes into it
    seconds = _time(graph.replay, repeats=50)
    del lists
    return seconds * 1e6


def _time(run: Callable[[], object], repeats: int) -> float:
    """Median seconds of a call over rounds of some, as many as fit into the time."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    seconds: list[float] = []
    while not seconds or (sum(seconds) * repeats < _SLOW and len(seconds) < 20):
        start.record()
        for _ in range(repeats):
            run()
        stop.record()
        stop.synchronize()
        seconds.append(float(start.elapsed_time(stop)) / repeats / 1e3)
    return statistics.median(seconds)


def _report(results: dict[str, Any], name: str, result: dict[str, float]) -> None:
    results[name] = result
    print(f"\n{name}", flush=True)
    for key, value in result.items():
        print(f"  {value:9.4g}  {key}", flush=True)


if __name__ == "__main__":
    typer.run(main)
