"""How well ``predictive_skip`` predicts what ``flash_skip_softmax`` v2 keeps: the built-in model.

``python -m benchmarks.prediction FILE`` runs one prompt of the text densely. In every layer
both rules judge the same scores, tile by tile: recall is the share of v2's kept tiles that the
prediction keeps for that query head, precision the share of what it keeps that v2 keeps. Tiles that
both must keep, the own block and the first one, are left out. What is read is the union of a group.
"""

from pathlib import Path
from typing import Any

import torch
import typer

from benchmarks.report import save
from service.engine.engine import Engine
from service.engine.events import NoEvents
from service.engine.generation import build_sequence
from service.engine.kv_cache import PageAllocator
from service.engine.scheduler import Chunk
from service.engine.sequence import SamplingParams
from service.evaluation.haystack import read_haystack
from service.models.loading import load_model
from service.settings import Settings
from sparse_methods import SparseAttentionMethod, get_sparse_method
from sparse_methods.kernels.operation import AttentionInputs

_BLOCK = 128


def main(text: Path, length: int = 4096, threshold: float = 0.1, *, write: bool = True) -> None:
    """Print precision and recall by layer, and over all."""
    engine = Engine(Settings(method="dense"), load_model(None, "cpu", "float32"), NoEvents())
    opening = engine.tokenizer.encode("")
    haystack = read_haystack(text, lambda part: engine.tokenizer.encode(part)[len(opening) :])
    [prompt] = haystack.windows(opening, length - 1, 1)
    rows = _judge(engine, prompt, threshold)
    total = [sum(column) for column in zip(*rows, strict=True)]
    results: dict[str, Any] = {"length": length, "threshold": threshold}
    for layer, (both, predicted, kept, read, visible) in enumerate([*rows, total]):
        name = "all" if layer == len(rows) else str(layer)
        figures = {
            "recall": both / max(1, kept),
            "precision": both / max(1, predicted),
            "density of v2": kept / visible,
            "density of the prediction": predicted / visible,
            "density of what is read": read / visible,
        }
        results[name] = figures
        listed = "  ".join(f"{key} {value:.3f}" for key, value in figures.items())
        print(f"layer {name:>3s}  {listed}")
    if write:
        print(f"written to {save('prediction-cpu', results)}")


def _judge(engine: Engine, prompt: list[int], threshold: float) -> list[tuple[int, ...]]:
    """Per layer, tiles of query heads: kept by both, predicted, kept by v2, read, visible."""
    v2 = get_sparse_method("flash_skip_softmax", "v2")({"prefill_threshold": threshold})
    prediction = get_sparse_method("predictive_skip")({"threshold": threshold})
    rows: list[tuple[int, ...]] = []

    def observe(inputs: AttentionInputs) -> None:
        scores = _scores(inputs)
        kept, predicted = _tiles(v2, scores), _tiles(prediction, scores)
        count = kept.shape[-1]
        is_open = torch.ones(count, count, dtype=torch.bool).tril(-1)
        is_open[:, 0] = False
        groups = predicted.unflatten(0, (inputs.geometry.num_kv_heads, -1))
        read = groups.any(1, keepdim=True).expand_as(groups).flatten(0, 1)
        counted = (kept & predicted, predicted, kept, read, torch.ones_like(kept))
        rows.append(tuple(int((tiles & is_open).sum()) for tiles in counted))

    engine.runner.attention.observe(observe)
    method = get_sparse_method("dense")()
    sequence = build_sequence("prediction", prompt, method, SamplingParams(max_tokens=1), 0)
    sequence.slot = 0
    PageAllocator(engine.runner.num_pages, _BLOCK).try_reserve(sequence, len(prompt))
    engine.runner.run([Chunk(sequence, 0, len(prompt))])
    return rows


def _scores(inputs: AttentionInputs) -> torch.Tensor:
    """[1, Hq, L, L] scores of a whole prompt, -inf after the diagonal."""
    length = len(inputs.query)
    pages = inputs.page_table.pages[0]
    keys = inputs.keys[pages].flatten(0, 1)[:length].transpose(0, 1)  # [Hkv, L, D]
    queries = inputs.query.transpose(0, 1) * inputs.geometry.scale
    scores = queries @ keys.repeat_interleave(inputs.geometry.group_size, 0).transpose(1, 2)
    is_hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    return scores.masked_fill_(is_hidden, float("-inf"))[None]


def _tiles(method: SparseAttentionMethod, scores: torch.Tensor) -> torch.Tensor:
    """[Hq, N, N] bool: tiles of which the method keeps anything."""
    mask, _ = method.calculate_sparsity(scores)
    tiles = mask[0].unflatten(2, (-1, _BLOCK)).unflatten(1, (-1, _BLOCK))
    kept: torch.Tensor = tiles.any(-1).any(2)
    return kept


if __name__ == "__main__":
    typer.run(main)
