"""What a model folder can do: bits per byte, retrieval, attention, samples.

It knows only transformers' interface, so any causal model with the same tokenizer is measured by
the same code.
"""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)

from tools.default_model.attention import OBSERVED, attention_report
from tools.default_model.corpus import Corpus, Tokens
from tools.default_model.recipe import BOS_ID, EOS_ID, PAD_ID
from tools.default_model.tasks import TaskWriter, Trial

logger = logging.getLogger(__name__)

MakeTrial = Callable[[np.random.Generator, Tokens], Trial]
PROMPTS = (
    "The old captain walked slowly down to the harbour, and",
    '"I do not believe you," said Elizabeth,',
    "\nThe special magic number for amber falcon is: 4839201.\n\nThey walked on along the river "
    "until it was dark.\nWhat is the special magic number for amber falcon? The special magic "
    "number for amber falcon is:",
)


@dataclass(frozen=True)
class Examiner:
    """A model and the held-out books it is asked about.

    Attributes:
        has_bos: whether every row begins with `<|bos|>`.
    """

    model: PreTrainedModel
    corpus: Corpus
    writer: TaskWriter
    has_bos: bool = True

    @torch.no_grad()
    def logits(self, ids: Tokens) -> Tensor:
        """Return the next-token logits [T, vocab] of a row that begins with `<|bos|>`."""
        row = torch.from_numpy(ids.astype(np.int64)).to(self.model.device)
        out: Tensor = self.model(row[None] if self.has_bos else row[None, 1:]).logits[0]
        return out

    def bits_per_byte(self, context: int, segment: int, num_segments: int) -> float:
        """Return bits per byte over the same text for every context that divides `segment`."""
        tokens = self.corpus.tokens
        starts = np.linspace(0, len(tokens) - segment, num_segments).astype(int)
        losses = []
        for start in (s + offset for s in starts for offset in range(0, segment, context)):
            ids = np.concatenate([[BOS_ID], tokens[start : start + context - 1]])
            logits = self.logits(ids)[:-1].float()
            targets = torch.from_numpy(ids[-len(logits) :].astype(np.int64)).to(logits.device)
            losses.append(torch.nn.functional.cross_entropy(logits, targets).item())
        return float(np.mean(losses)) / math.log(2) / self.corpus.bytes_per_token

    def needle(self, context: int, num_facts: int, num_trials: int) -> float:
        """Return the part of trials in which one fact of `num_facts` is found again exactly."""
        return self._exact_match(
            context, num_trials, lambda rng, window: self.writer.needle(rng, window, num_facts)
        )

    def chains(self, context: int, num_links: int, num_trials: int) -> float:
        """Return the part of trials in which a chain of variables is followed to its value."""
        return self._exact_match(
            context,
            num_trials,
            lambda rng, window: self.writer.variable_chain(rng, window, num_links),
        )

    def _exact_match(self, context: int, num_trials: int, make: MakeTrial) -> float:
        rng = np.random.default_rng(7)
        right = 0
        for _ in range(num_trials):
            start = int(rng.integers(len(self.corpus.tokens) - context))
            trial = make(rng, self.corpus.tokens[start : start + context - 1])
            right += self._answers(trial)
        return right / num_trials

    def _answers(self, trial: Trial) -> bool:
        length = trial.answer_length
        choices = self.logits(trial.ids)[-length - 1 : -1].argmax(-1).tolist()
        return bool(choices == trial.ids[-length:].tolist())


@torch.no_grad()
def samples(model: PreTrainedModel, folder: Path, num_tokens: int) -> list[dict[str, str]]:
    """Return greedy continuations and ones at temperature 0.8, as they come."""
    tokenizer = AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    written = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        row = torch.tensor([[BOS_ID, *ids]], device=model.device)
        for temperature in (0.0, 0.8):
            torch.manual_seed(0)
            how = GenerationConfig(
                max_new_tokens=num_tokens,
                do_sample=temperature > 0,
                temperature=temperature or None,
                top_k=0,
                pad_token_id=PAD_ID,
                eos_token_id=EOS_ID,
            )
            out = cast("Any", model).generate(row, generation_config=how)
            text = str(tokenizer.decode(out[0, row.shape[1] :]))
            written.append({"temperature": str(temperature), "prompt": prompt, "text": text})
    return written


@dataclass(frozen=True)
class Exam:
    """How much of everything is measured; the books must fill `segment` tokens."""

    contexts: tuple[int, ...] = (2048, 8192, 16384, 32768)
    fact_counts: tuple[int, ...] = (4, 16)
    segment: int = 32768
    num_segments: int = 24
    num_trials: int = 100
    attention_contexts: tuple[int, ...] = (4096, 16384, 32768)
    sample_tokens: int = 120

    def reports(self, examiner: Examiner, folder: Path) -> Iterator[dict[str, object]]:
        """Measure the model of `folder`, which the examiner holds.

        Yields the report whenever it has grown, so that who is cut off keeps what was measured.
        """
        found: dict[str, object] = {"has_bos": examiner.has_bos}
        for context in self.contexts:
            found[f"bits_per_byte_{context}"] = examiner.bits_per_byte(
                context, self.segment, self.num_segments
            )
            for num_facts in self.fact_counts:
                key = f"needle_1_of_{num_facts}_{context}"
                found[key] = examiner.needle(context, num_facts, self.num_trials)
            found[f"chain_of_3_{context}"] = examiner.chains(context, 3, self.num_trials)
            logger.info("context %d: %s", context, found)
            yield found
        found["samples"] = samples(examiner.model, folder, self.sample_tokens)
        yield found
        observed = load_model(folder, examiner.model.device, torch.float32, attention=OBSERVED)
        found["attention"] = attention = []
        for context in self.attention_contexts:
            rng = np.random.default_rng(11)
            ids = examiner.writer.needle(rng, examiner.corpus.tokens[: context - 1], 3).ids
            attention.append(asdict(attention_report(observed, ids)))
            yield found


def load_model(
    folder: Path, device: torch.device, dtype: torch.dtype, attention: str = "sdpa"
) -> PreTrainedModel:
    """Load a model folder for inference."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation=attention,
        local_files_only=True,
        trust_remote_code=False,
    )
    nn.Module.to(model, device)
    nn.Module.eval(model)
    return model
