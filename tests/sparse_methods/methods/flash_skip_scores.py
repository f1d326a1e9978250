"""Configurations of ``flash_skip_softmax@v1`` in both its spellings, and scores to decide about."""

import math
from typing import Any

import numpy as np
import pytest
import torch

LOWEST = torch.finfo(torch.float32).min
GEOMETRY = {"br": 128, "bc": 128, "backend": "pytorch", "is_causal": True}
SCALAR = {"threshold": {"prefill": 1e-3, "decode": 1e-5}, **GEOMETRY}
LISTS = {"thresholds": {"prefill": [1e-3], "decode": [1e-5]}, **GEOMETRY}
both_generations = pytest.mark.parametrize("config", [SCALAR, LISTS], ids=["scalar", "lists"])


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    """Frozen noise: NumPy guarantees the stream of RandomState across versions."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape)).float()


def causal(scores: torch.Tensor) -> torch.Tensor:
    num_queries, num_keys = scores.shape[-2:]
    hidden = torch.ones(num_queries, num_keys, dtype=torch.bool).triu(num_keys - num_queries + 1)
    return scores.masked_fill(hidden, torch.finfo(scores.dtype).min)


def sink_and_diagonal(num_queries: int, num_keys: int) -> torch.Tensor:
    """Causal scores of 20 in the first block and the query's own, 0 elsewhere."""
    keys = torch.arange(num_keys) // 128
    own = torch.arange(num_keys - num_queries, num_keys)[:, None] // 128
    return causal(20.0 * ((keys == 0) | (keys == own)).float()[None, None])


def uneven(num_queries: int, num_keys: int, *, seed: int = 0, size: int = 128) -> torch.Tensor:
    """Causal noise of which every block has its own level, so that some are worth skipping."""
    rows, columns = math.ceil(num_queries / size), math.ceil(num_keys / size)
    levels = 6 * gaussian(2, 3, rows, columns, seed=seed + 1)
    spread = levels.repeat_interleave(size, 2).repeat_interleave(size, 3)
    return causal(
        gaussian(2, 3, num_queries, num_keys, seed=seed) + spread[:, :, :num_queries, :num_keys]
    )


def as_numbers(stats: dict[str, Any]) -> dict[str, Any]:
    """Statistics of the list spelling with its one threshold, as the scalar spelling has them."""
    return {key: value[0] if isinstance(value, list) else value for key, value in stats.items()}
