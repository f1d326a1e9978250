"""Times on a GPU: contenders in turns, since one that runs first finds a cool and faster device."""

import statistics
from collections.abc import Callable, Mapping

import torch

Run = Callable[[], object]


def captured(run: Run) -> Run:
    """What replays ``run``, which must have nothing to compile or allocate the second time."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def seconds_of(run: Run, repeats: int = 20) -> float:
    """Seconds of one call on the device, mean of those timed after a first one."""
    run()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        run()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / repeats / 1e3


def alternate(contenders: Mapping[str, Run], rounds: int) -> dict[str, float]:
    """Median seconds of each, of short work; the rounds alternate."""
    return _in_turns(contenders, dict.fromkeys(contenders, 20), rounds)


def alternate_for(contenders: Mapping[str, Run], rep_ms: int, rounds: int = 5) -> dict[str, float]:
    """Median milliseconds of each; each runs for about ``rep_ms`` in all, in turns."""
    repeats = {
        name: max(2, round(rep_ms / rounds / 1e3 / seconds_of(run, 2)))
        for name, run in contenders.items()
    }
    return {name: s * 1e3 for name, s in _in_turns(contenders, repeats, rounds).items()}


def _in_turns(
    contenders: Mapping[str, Run], repeats: Mapping[str, int], rounds: int
) -> dict[str, float]:
    times = [
        {name: seconds_of(run, repeats[name]) for name, run in contenders.items()}
        for _ in range(rounds)
    ]
    return {name: statistics.median(each[name] for each in times) for name in contenders}
