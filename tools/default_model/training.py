"""The training loop: stages of growing context, stopped and taken up again at any step."""

import copy
import json
import logging
import math
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tools.default_model.batches import MicroBatches, load_batches
from tools.default_model.corpus import Corpus
from tools.default_model.export import exported_weights
from tools.default_model.model import LanguageModel, cross_entropy
from tools.default_model.optim import make_optimizers, set_learning_rates
from tools.default_model.recipe import BOS_ID, TILE, Recipe
from tools.default_model.tasks import TaskWriter

logger = logging.getLogger(__name__)


@dataclass
class StopRequest:
    """Whether to stop after the current step: a signal came, or the time is used up."""

    deadline: float = math.inf
    signalled: bool = False

    def listen(self) -> None:
        """Stop on SIGTERM and SIGINT."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: setattr(self, "signalled", True))

    @property
    def is_due(self) -> bool:
        """Return whether to save and leave now."""
        return self.signalled or time.monotonic() > self.deadline


@dataclass
class Trainer:
    """A run: model, optimisers, plan and place.

    Attributes:
        folder: where checkpoint, plan and log are kept; a run found there is taken up.
        held_out: books for the loss that is logged, or None.
        start: an export to start from and the step of this plan it was made at, with fresh
            optimisers; 0 for the weights of another run. A checkpoint in `folder` goes before it.
        num_workers: processes that make micro-batches; 0 makes them in this one.
    """

    recipe: Recipe
    corpus: Corpus
    writer: TaskWriter
    folder: Path
    device: torch.device
    held_out: Corpus | None = None
    start: tuple[Path, int] | None = None
    num_workers: int = 0
    log_every: int = 50
    save_every: int = 1000
    stop: StopRequest = field(default_factory=StopRequest)
    step: int = 0

    def __post_init__(self) -> None:
        """Build the model and the optimisers, and take up a checkpoint if there is one."""
        torch.manual_seed(self.recipe.seed)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.model = LanguageModel(self.recipe.shape).to(self.device)
        self.loss_function = cross_entropy
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
            self.model.compute_dtype = torch.bfloat16
            for block in self.model.layers:
                block.compile(dynamic=False)  # one compilation serves all blocks of a shape
            self.loss_function = torch.compile(cross_entropy, dynamic=False)
        self.optimizers = make_optimizers(self.model, self.recipe)
        self.checkpoint = self.folder / "checkpoint.pt"
        if self.checkpoint.exists():
            self._load()
        elif self.start is not None:
            folder, self.step = self.start
            self.model.load_state_dict(exported_weights(folder))

    def save(self) -> None:
        """Write the checkpoint; the old one stays until the new one is whole."""
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.checkpoint)

    def _load(self) -> None:
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        logger.info("taken up at step %d", self.step)

    def plan(self, budget_s: float) -> list[int]:
        """Return the steps of each stage: those planned before, or what fits into `budget_s`."""
        path = self.folder / "plan.json"
        if not path.exists():
            rates = self._measure()
            planned = [
                max(1, int(stage.share * budget_s * rate / self.recipe.tokens_per_step))
                for stage, rate in zip(self.recipe.stages, rates, strict=True)
            ]
            path.write_text(json.dumps({"steps": planned, "tokens_per_s": rates}))
        steps: list[int] = json.loads(path.read_text())["steps"]
        logger.info("plan: %s", path.read_text())
        return steps

    def _measure(self) -> list[float]:
        """Return the tokens per second of each stage, from steps on random rows taken back."""
        before, step = copy.deepcopy(self.model.state_dict()), self.step
        rates = [self._tokens_per_s(index) for index in range(len(self.recipe.stages))]
        self.model.load_state_dict(before)
        self.optimizers = make_optimizers(self.model, self.recipe)
        self.step = step
        return rates

    def _tokens_per_s(self, stage_index: int) -> float:
        self._enter(stage_index)
        per_step = self.recipe.tokens_per_step // self.recipe.tokens_per_micro_batch
        num_rows = max(1, self.recipe.tokens_per_micro_batch // self.stage.context)
        size = (num_rows, self.stage.context + 1)
        rows = torch.randint(3, self.recipe.shape.vocab_size, size, dtype=torch.int32)
        times = []
        for _ in range(6):
            start = time.perf_counter()
            self._train_step([rows] * per_step, progress=1.0).tolist()  # waits for the device
            times.append(time.perf_counter() - start)
        return self.recipe.tokens_per_step / min(times)

    def run(self, steps: list[int]) -> bool:
        """Train up to the end of the plan; return False when stopped before it.

        Raises:
            ValueError: the weights to start from lie at or past the plan's end.
        """
        if self.start and self.start[1] >= sum(steps):
            message = f"start step {self.start[1]} is not within the plan's {sum(steps)} steps"
            raise ValueError(f"{message}; give 0 to fine-tune the weights of a finished run")
        first = 0
        for index, num_steps in enumerate(steps):
            if self.step < first + num_steps and not self._run_stage(index, first, num_steps):
                self.save()
                return False
            first += num_steps
            self.save()
        return True

    def _run_stage(self, stage_index: int, first: int, num_steps: int) -> bool:
        self._enter(stage_index)
        per_step = self.recipe.tokens_per_step // self.recipe.tokens_per_micro_batch
        batches = MicroBatches(self.corpus.tokens, self.writer, self.recipe, stage_index)
        indices = range((self.step - first) * per_step, num_steps * per_step)
        loader = iter(load_batches(batches, indices, self.num_workers))
        started, start_step = time.monotonic(), self.step
        while self.step < first + num_steps:
            if self.stop.is_due:
                return False
            share_done = sum(stage.share for stage in self.recipe.stages[:stage_index])
            stage = self.recipe.stages[stage_index]
            progress = share_done + stage.share * (self.step - first) / num_steps
            losses = self._train_step([next(loader) for _ in range(per_step)], progress)
            if self.step % self.log_every == 0 or self.step == first + num_steps:
                rate = (self.step - start_step) / (time.monotonic() - started)
                self._log(stage.context, losses, rate * self.recipe.tokens_per_step)
            if self.step % self.save_every == 0:
                self.save()
        return True

    def _enter(self, stage_index: int) -> None:
        self.stage = self.recipe.stages[stage_index]
        self.model.train()
        self.model.set_dropout(self.stage.dropout)

    def _train_step(self, micro_batches: list[Tensor], progress: float) -> Tensor:
        torch.manual_seed(self.recipe.seed + self.step)  # a resumed run draws the same dropout
        start_step = self.start[1] if self.start else None
        factor = self.recipe.learning_rate(self.step, progress, start_step)
        set_learning_rates(self.optimizers, factor)
        losses = torch.stack(
            [self._backward(rows, 1 / len(micro_batches)) for rows in micro_batches]
        )
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self._drop_gradients()
        self.step += 1
        return losses.mean(0)

    def _backward(self, rows: Tensor, weight: float = 1.0) -> Tensor:
        """Add a micro-batch's gradients; return its loss and its soft density."""
        rows = rows.to(self.device, non_blocking=True).long()
        sharpness = self.stage.sharpness
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            hidden, density = self.model(rows[:, :-1], self._query_rows() if sharpness else None)
            loss = self.loss_function(hidden, self.model.embed_tokens.weight, rows[:, 1:])
        ((loss + sharpness * density) * weight).backward()
        return torch.stack([loss.detach(), density.detach()])

    def _query_rows(self) -> Tensor:
        """Draw the tile of queries whose density is trained, past the first eighth of the row."""
        num_tiles = self.stage.context // TILE
        tile = torch.randint(max(2, num_tiles // 8), num_tiles, (1,), device=self.device)
        return tile * TILE + torch.arange(TILE, device=self.device)

    def _drop_gradients(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _log(self, context: int, losses: Tensor, tokens_per_s: float) -> None:
        loss, density = losses.tolist()
        held_out = self._held_out_bits() if self.held_out else math.nan
        logger.info(
            "step %d context %d loss %.4f soft_density %.3f held_out_bits_per_byte %.4f "
            "tokens_per_s %.0f lr %.5f",
            *(self.step, context, loss, density, held_out, tokens_per_s),
            self.optimizers[0].param_groups[0]["lr"],
        )

    @torch.no_grad()
    def _held_out_bits(self, num_rows: int = 64, length: int = 2047) -> float:
        """Return bits per byte on evenly spread windows of the held-out books."""
        assert self.held_out is not None  # noqa: S101 - tells the type, cannot fail
        tokens = self.held_out.tokens
        length = min(length, len(tokens) // num_rows)
        starts = np.linspace(0, len(tokens) - length, num_rows).astype(int)
        rows = np.stack([np.concatenate([[BOS_ID], tokens[s : s + length]]) for s in starts])
        ids = torch.from_numpy(rows).to(self.device).long()
        self.model.eval()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            hidden, _ = self.model(ids)
            loss = self.loss_function(
                hidden[:, :-1].contiguous(), self.model.embed_tokens.weight, ids[:, 1:].contiguous()
            )
        self.model.train()
        return loss.item() / math.log(2) / self.held_out.bytes_per_token
