"""What the sampler chose, on its way from the device to the host."""

import math
from dataclasses import dataclass

import torch

from service.engine.sequence import Sequence, TokenLogprob
from service.engine.transfer import Landmark, to_host
from service.errors import GenerationError

NO_TOKEN = -1


@dataclass(frozen=True)
class SampleResult:
    """What one call of the sampler chose.

    Attributes:
        token_ids: One per row; -1 for a failed one.
        logprobs: One per row; None where not asked for or failed.
        failed: Rows whose logits were not finite; their sequences cannot go on.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprob | None]
    failed: list[int]


@dataclass(frozen=True)
class LogprobReport:
    """Log-probabilities of some rows, in the host's memory once they have arrived.

    Attributes:
        wanted: How many of the most likely tokens each of these R rows reports.
        own: [R] log-probability of the chosen token.
        best_ids: [R, K] most likely tokens.
        best: [R, K] theirs.
    """

    wanted: dict[int, int]
    own: torch.Tensor
    best_ids: torch.Tensor
    best: torch.Tensor

    def of_rows(self, token_ids: list[int]) -> list[TokenLogprob | None]:
        """Of every row that was sampled; None where not asked for or failed."""
        reports: list[TokenLogprob | None] = [None] * len(token_ids)
        own, best_ids, best = self.own.tolist(), self.best_ids.tolist(), self.best.tolist()
        for k, (row, num_top) in enumerate(self.wanted.items()):
            if token_ids[row] != NO_TOKEN:
                top = zip(best_ids[k][:num_top], best[k], strict=False)
                possible = tuple((t, logprob) for t, logprob in top if logprob > -math.inf)
                reports[row] = TokenLogprob(token_ids[row], own[k], possible)
        return reports


class Sampled:
    """Tokens that were chosen for the rows of one step, perhaps not computed yet.

    Attributes:
        token_ids: [S] int64 on the device; ``NO_TOKEN`` for a failed row.
    """

    def __init__(self, token_ids: torch.Tensor, report: LogprobReport | None) -> None:
        self.token_ids = token_ids
        self._report = report
        self._on_host = to_host(token_ids)
        self._arrived = Landmark(token_ids.device)

    def result(self) -> SampleResult:
        """Wait for the tokens."""
        self._arrived.wait()
        chosen: list[int] = self._on_host.tolist()
        failed = [row for row, token_id in enumerate(chosen) if token_id == NO_TOKEN]
        no_report: list[TokenLogprob | None] = [None] * len(chosen)
        logprobs = no_report if self._report is None else self._report.of_rows(chosen)
        return SampleResult(chosen, logprobs, failed)


def no_token_error(sequence: Sequence) -> GenerationError:
    """Why nothing could be chosen for a sequence."""
    if sequence.matcher is not None and sequence.matcher.failure:
        return GenerationError(
            f"The grammar of this request cannot be followed: {sequence.matcher.failure}"
        )
    return GenerationError("The model's output for this request is not a number.")
