"""What several GPUs make of one model: random weights in the shape of Llama 3.1 8B.

``python -m benchmarks.tensor_parallel`` measures one rank, then as many as there are GPUs: time to
first token and tokens per second, of the model runner and of the engine, and how they scale. Each
number of ranks runs in processes of its own; their logits are compared with those of one rank.
``--rehearse`` runs everything on the CPU with a tiny shape, to see that it runs.
"""

import faulthandler
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import typer

from benchmarks.llama import (
    BLOCK,
    SHAPE,
    build_model,
    decode_step,
    engine_step,
    first_token,
    sequence_of,
)
from benchmarks.report import save
from service.engine.kv_cache import PageAllocator
from service.engine.model_runner import ModelRunner
from service.engine.parallel import LeadingRunner, Ranks
from service.engine.scheduler import Chunk
from service.engine.trial import packed_logits
from service.models.loading import LoadedModel
from service.models.self_test import run_self_test
from service.models.sharding import shard_model
from service.parallel.followers import Followers
from service.parallel.group import RankGroup, open_meeting

_RANK = "benchmarks.tensor_parallel_rank"
_TINY = {**SHAPE, "hidden_size": 128, "intermediate_size": 256, "head_dim": 16}
_LIMIT_S = 240  # of one number of ranks; whatever hangs then, says where
_CHUNK = 8192
_LENGTHS = {"cuda": (1024, 8192, 32768), "cpu": (256,)}
_BATCHES = {"cuda": ((1, 1024), (32, 1024), (128, 1024), (8, 32768)), "cpu": ((2, 256),)}
_NUM_REPEATS = 4


def main(
    ranks: list[int] | None = None,
    method: str = "dense",
    num_layers: int = 32,
    *,
    rehearse: bool = False,
    write: bool = True,
    only: Path | None = None,
) -> None:
    """Measure one rank and many; --only FILE measures the one number of ranks given, here."""
    kind = "cpu" if rehearse else "cuda"
    if kind == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("this benchmark needs CUDA devices; --rehearse needs none")
    if only is not None:
        faulthandler.dump_traceback_later(_LIMIT_S, exit=True)
        result, logits = measure((ranks or [1])[0], kind, method, num_layers)
        torch.save({"result": result, "logits": logits}, only)
        sys.stdout.flush()
        os._exit(0)  # all is measured: whatever the ends of communicators wait for may wait
    sizes = ranks or sorted({1, 2 if rehearse else torch.cuda.device_count()})
    results: dict[str, Any] = {
        "method": method,
        **_measured(sizes, ["--method", method, "--num-layers", str(num_layers)], kind),
    }
    print(json.dumps(results, indent=1))
    if write and not rehearse:
        print(f"written to {save('tensor-parallel', results)}")
    if any("error" in result for result in results["ranks"].values()):
        raise typer.Exit(1)


def _measured(sizes: list[int], options: list[str], kind: str) -> dict[str, Any]:
    """Results by number of ranks, and what the first of them takes over what each other takes."""
    found: dict[int, dict[str, Any]] = {}
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "result"
            command = [sys.executable, "-m", "benchmarks.tensor_parallel", "--ranks", str(size)]
            command += [*options, "--only", str(file), *(["--rehearse"] * (kind == "cpu"))]
            print(f"\n{size} of {sizes} ranks", flush=True)
            if subprocess.run(command, check=False).returncode:  # noqa: S603 - this very module
                found[size] = {"result": {"error": "it failed; see what it printed"}}
            else:
                found[size] = torch.load(file, weights_only=True)
    first = found[sizes[0]]
    for size in sizes[1:]:
        if "logits" not in found[size] or "logits" not in first:
            continue
        difference = (found[size]["logits"] - first["logits"]).norm() / first["logits"].norm()
        result = found[size]["result"]
        result["logits_differ_by"] = float(difference)
        result["speed_up"] = {
            figure: {shape: value / result[figure][shape] for shape, value in of_first.items()}
            for figure, of_first in first["result"].items()
            if figure in {"first_token_s", "step_ms", "engine_step_ms"}
        }
    return {"ranks": {str(size): found[size]["result"] for size in sizes}}


def measure(size: int, kind: str, method: str, num_layers: int) -> tuple[dict[str, Any], Any]:
    """The figures of one number of ranks, and [5, V] logits of a short text."""
    started_at = time.perf_counter()
    if size == 1:
        loaded = build(kind, num_layers)
        runner, ranks = ModelRunner(loaded.model, _modules(loaded), **cache(kind)), None
    else:
        ranks = _start(size, kind, num_layers)
        loaded = build(kind, num_layers, ranks.group)
        runner = LeadingRunner(ranks, loaded.model, _modules(loaded), **cache(kind))
    test = run_self_test(loaded, lambda prompts: packed_logits(runner, prompts, _CHUNK))
    result: dict[str, Any] = {"self_test_error": test.error}
    result["start_s"] = time.perf_counter() - started_at
    print("\n".join(loaded.notes), f"\nself-test {test.error:.2g}", flush=True)
    logits = _short_text(runner, method)
    result["first_token_s"] = {
        str(length): min(first_token(runner, method, length, _CHUNK) for _ in range(_NUM_REPEATS))
        for length in _LENGTHS[kind]
    }
    for figure, time_step in (("step_ms", decode_step), ("engine_step_ms", engine_step)):
        steps = {f"{b}x{n}": time_step(runner, method, b, n) for b, n in _BATCHES[kind]}
        result[figure] = steps
        print(figure, steps, flush=True)
    result["tokens_per_s"] = {
        shape: int(shape.partition("x")[0]) / milliseconds * 1e3
        for shape, milliseconds in result["engine_step_ms"].items()
    }
    if ranks is not None:
        ranks.stop(runner)
    return result, logits


def build(kind: str, num_layers: int, group: RankGroup | None = None) -> LoadedModel:
    """The model, the same on every rank until it is divided; of a group, this rank's share."""
    torch.manual_seed(0)
    shape = SHAPE if kind == "cuda" else _TINY
    layers = num_layers if kind == "cuda" else 2
    if group is None:
        return build_model(layers, shape=shape, device=kind)
    return shard_model(build_model(layers, fuse=False, shape=shape, device=kind), group, fuse=True)


def cache(kind: str) -> dict[str, int]:
    """Size of the cache of a runner."""
    return {"num_pages": 2400 if kind == "cuda" else 64, "block_size": BLOCK, "num_slots": 160}


def _modules(loaded: LoadedModel) -> list[tuple[Any, Any]]:
    return [(layer.module, layer.geometry) for layer in loaded.layers]


def _start(size: int, kind: str, num_layers: int) -> Ranks:
    meeting = open_meeting(size)
    followers = Followers(_RANK, size)
    followers.tell((size, kind, num_layers, meeting.port))
    return Ranks(RankGroup.join(meeting, 0, size, kind), followers)


def _short_text(runner: ModelRunner, method: str) -> torch.Tensor:
    """[5, V] logits of a prompt's last row and of four generated ones, which graphs compute."""
    sequence = sequence_of(method, 1000, 0)
    pages = PageAllocator(runner.num_pages, BLOCK)
    rows = []
    for num_tokens in (1000, 1, 1, 1, 1):
        pages.try_reserve(sequence, num_tokens)
        logits, _ = runner.run([Chunk(sequence, sequence.num_computed_tokens, num_tokens)])
        rows.append(logits.float().cpu())
        sequence.num_computed_tokens += num_tokens
        sequence.output_ids.append(7)
    return torch.cat(rows)


if __name__ == "__main__":
    typer.run(main)
