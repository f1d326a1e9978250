"""Log-probabilities of prompt tokens: what the model would have said instead of the prompt.

The row of a prompt's token tells of the token after it. A step keeps the logits of such rows behind
those it samples from, for the sequences whose clients asked.
"""

import traceback
from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch

from service.engine.scheduler import Chunk
from service.engine.sequence import Sequence, TokenLogprob
from service.engine.transfer import to_device, to_host

_NUM_ROWS_AT_ONCE = 256  # of a vocabulary in float32


def num_prompt_rows(chunk: Chunk) -> int:
    """Leading rows of a chunk whose logits are reported; the prompt's last one is sampled from.

    None once there is a token: the report came with it, and the prompt is computed again.
    """
    sequence = chunk.sequence
    if sequence.sampling.prompt_logprobs is None or sequence.output_ids:
        return 0
    return max(0, min(chunk.stop, sequence.num_prompt_tokens - 1) - chunk.start)


@dataclass(frozen=True)
class PromptReport:
    """A part of a prompt, in the host's memory once it has arrived.

    Attributes:
        start: Position of the first row; the first token reported is the one after it.
        token_ids: The T tokens reported.
        own: [T] log-probability of each.
        best_ids: [T, K] most likely tokens at each place.
        best: [T, K] theirs.
    """

    sequence: Sequence
    start: int
    token_ids: list[int]
    own: torch.Tensor
    best_ids: torch.Tensor
    best: torch.Tensor

    def extend(self, known: list[TokenLogprob]) -> None:
        """Add to the tokens known so far; a prompt that is computed again changes nothing.

        Raises:
            ValueError: A part before this one is missing.
        """
        first = len(known) - self.start
        if first < 0:
            raise ValueError(
                f"a prompt is reported from {self.start} on, but known to {len(known)}"
            )
        own = self.own[first:].tolist()
        tops = zip(self.best_ids[first:].tolist(), self.best[first:].tolist(), strict=True)
        for token_id, logprob, top in zip(self.token_ids[first:], own, tops, strict=True):
            known.append(TokenLogprob(token_id, logprob, tuple(zip(*top, strict=True))))


@dataclass(frozen=True)
class FailedReport:
    """A part of a prompt that could not be reported; the step goes on for everybody else."""

    sequence: Sequence
    cause: Exception

    def extend(self, known: list[TokenLogprob]) -> None:  # noqa: ARG002 - as ``PromptReport``
        """Raise what went wrong."""
        raise self.cause


def prompt_reports(logits: torch.Tensor, chunks: Items[Chunk]) -> list[PromptReport | FailedReport]:
    """Report the rows [P, V] that ``num_prompt_rows`` counts, chunk after chunk."""
    reports: list[PromptReport | FailedReport] = []
    first = 0
    for chunk in chunks:
        num_rows = num_prompt_rows(chunk)
        if num_rows:
            reports.append(_try_report(logits[first : first + num_rows], chunk))
            first += num_rows
    return reports


def _try_report(logits: torch.Tensor, chunk: Chunk) -> PromptReport | FailedReport:
    # The step has counted what it read, so it must not be computed again for the sake of one.
    try:
        return _report(logits, chunk)
    except Exception as error:  # noqa: BLE001 - its request is told when the step is collected
        traceback.clear_frames(error.__traceback__)  # which hold tensors, and memory may be short
        return FailedReport(chunk.sequence, error)


def _report(logits: torch.Tensor, chunk: Chunk) -> PromptReport:
    sequence, start = chunk.sequence, chunk.start
    token_ids = sequence.prompt_ids[start + 1 : start + 1 + len(logits)]
    num_best = min(sequence.sampling.prompt_logprobs or 0, logits.shape[1])
    targets = to_device(token_ids, logits.device, torch.int64)
    parts = [
        _most_likely(rows, own, num_best)
        for rows, own in zip(
            logits.split(_NUM_ROWS_AT_ONCE), targets.split(_NUM_ROWS_AT_ONCE), strict=True
        )
    ]
    own, best_ids, best = (to_host(torch.cat(column)) for column in zip(*parts, strict=True))
    return PromptReport(sequence, start, token_ids, own, best_ids, best)


def _most_likely(
    logits: torch.Tensor, targets: torch.Tensor, num_best: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logprobs = logits.float().log_softmax(dim=-1)
    # A token beyond the vocabulary is padding that nobody should have sent; its row says little.
    known = targets.clamp_max(logits.shape[1] - 1)
    best = logprobs.topk(num_best, dim=-1)
    return logprobs.gather(1, known[:, None])[:, 0], best.indices, best.values
