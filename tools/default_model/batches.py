"""Micro-batches by number: the same stage and index always give the same rows."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from tools.default_model.corpus import Tokens
from tools.default_model.recipe import BOS_ID, Recipe, Stage
from tools.default_model.tasks import TaskWriter


@dataclass(frozen=True)
class MicroBatches(Dataset[Tensor]):
    """The micro-batches of one stage, each [rows, context + 1] int32, made when asked for."""

    tokens: Tokens
    writer: TaskWriter
    recipe: Recipe
    stage_index: int

    @override
    def __getitem__(self, index: int) -> Tensor:
        """Make micro-batch `index`: inputs are its columns but the last, targets but the first."""
        stage = self.recipe.stages[self.stage_index]
        rng = np.random.default_rng([self.recipe.seed, self.stage_index, index])
        num_rows = max(1, self.recipe.tokens_per_micro_batch // stage.context)
        rows = [self._row(rng, stage) for _ in range(num_rows)]
        return torch.from_numpy(np.stack(rows).astype(np.int32))

    def _row(self, rng: np.random.Generator, stage: Stage) -> Tokens:
        start = int(rng.integers(len(self.tokens) - stage.context + 1))
        window = self.tokens[start : start + stage.context]
        if stage.drilled and rng.random() < stage.drilled:
            return self.writer.drilled_row(rng, window)
        if rng.random() < stage.planted:
            return self.writer.planted_row(rng, window)
        return np.concatenate([np.array([BOS_ID], dtype=np.uint16), window])


def load_batches(batches: MicroBatches, indices: range, num_workers: int) -> DataLoader[Tensor]:
    """Return a loader that gives the micro-batches of `indices` in order."""
    return DataLoader(
        batches,
        batch_size=None,
        sampler=indices,
        num_workers=num_workers,
        prefetch_factor=8 if num_workers else None,
        pin_memory=torch.cuda.is_available(),
    )
