"""Chooses the next token of every sequence of a step.

A row's token never depends on the rows beside it: each sequence brings its own generator, and the
draw adds up integers, whose sum is the same in any order and any batch.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter
from weakref import WeakKeyDictionary

import torch

from service.engine.sequence import SamplingParams, Sequence, TokenLogprob

# Weight of the likeliest token. Ids below 2^18 (2^22 at most) keep every sum within 63 bits, and
# what this resolution drops is less likely than 1e-12 of the likeliest token.
UNIT = 2.0**40
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


class _History:
    """Which tokens a sequence holds, kept up to date as it grows.

    Attributes:
        in_prompt: [V] bool.
        output_counts: [V] float32.
    """

    def __init__(self, prompt_ids: list[int], vocab_size: int, device: torch.device) -> None:
        self.in_prompt = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self.output_counts = torch.zeros(vocab_size, device=device)
        self._num_counted = 0
        self.in_prompt[self._known(prompt_ids)] = True

    def update(self, output_ids: list[int]) -> None:
        """Count the output tokens that came since the last call."""
        new = self._known(output_ids[self._num_counted :])
        self._num_counted = len(output_ids)
        self.output_counts.index_add_(0, new, torch.ones(len(new), device=new.device))

    def _known(self, token_ids: list[int]) -> torch.Tensor:
        ids = torch.tensor(token_ids, dtype=torch.int64)
        return ids[(ids >= 0) & (ids < len(self.in_prompt))].to(self.in_prompt.device)


class Sampler:
    """Samples one token per row of logits.

    Order: penalties, minimum length, temperature, top-k, top-p, min-p, draw; log-probabilities are
    those of the untouched logits. Among equals the lowest id comes first.
    """

    def __init__(
        self, device: torch.device, vocab_size: int, eos_token_ids: frozenset[int] = frozenset()
    ) -> None:
        self._device = device
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        # Weak, because the sampler is not told when a sequence ends.
        self._histories: WeakKeyDictionary[Sequence, _History] = WeakKeyDictionary()

    def sample(self, logits: torch.Tensor, sequences: list[Sequence]) -> SampleResult:
        """Choose the next tokens; sequences with a temperature advance their generators.

        Args:
            logits: [S, V] of any float type; columns beyond the vocabulary are padding.
            sequences: The sequence of each row.
        """
        raw = logits[:, : self._vocab_size].float()
        adjusted = self._mask_stops(self._penalise(raw, sequences), sequences)
        best, token_ids = adjusted.max(dim=-1)  # first of equals; NaN if any is
        random_rows = [i for i, seq in enumerate(sequences) if seq.sampling.temperature > 0]
        if random_rows:
            rows = self._tensor(random_rows)
            drawn = self._draw(adjusted[rows], best[rows], [sequences[i] for i in random_rows])
            token_ids = token_ids.index_put((rows,), drawn)
        logprobs = self._report(raw, token_ids, sequences)
        chosen = torch.where(best.isfinite(), token_ids, NO_TOKEN).tolist()
        failed = [i for i, token_id in enumerate(chosen) if token_id == NO_TOKEN]
        for i in failed:
            logprobs[i] = None
        return SampleResult(chosen, logprobs, failed)

    def _penalise(self, logits: torch.Tensor, sequences: list[Sequence]) -> torch.Tensor:
        penalised = [i for i, seq in enumerate(sequences) if _has_penalty(seq.sampling)]
        if not penalised:
            return logits
        chosen = [sequences[i] for i in penalised]
        histories = [self._history(seq) for seq in chosen]
        counts = torch.stack([history.output_counts for history in histories])  # [R, V]
        is_new = counts == 0
        is_absent = is_new & ~torch.stack([history.in_prompt for history in histories])

        rows = self._tensor(penalised)
        values = logits[rows]
        repetition = self._column(chosen, "repetition_penalty")
        values = torch.where(
            is_absent, values, torch.where(values > 0, values / repetition, values * repetition)
        )
        values -= self._column(chosen, "frequency_penalty") * counts
        values -= self._column(chosen, "presence_penalty") * ~is_new
        return logits.index_put((rows,), values)

    def _history(self, seq: Sequence) -> _History:
        history = self._histories.get(seq)
        if history is None:
            history = _History(seq.prompt_ids, self._vocab_size, self._device)
            self._histories[seq] = history
        history.update(seq.output_ids)
        return history

    def _mask_stops(self, logits: torch.Tensor, sequences: list[Sequence]) -> torch.Tensor:
        """Make the tokens impossible that would end a sequence before its minimum length."""
        masked = [
            (row, token_id)
            for row, seq in enumerate(sequences)
            if len(seq.output_ids) < seq.sampling.min_tokens
            for token_id in self._stop_token_ids(seq.sampling)
            if 0 <= token_id < self._vocab_size
        ]
        if not masked:
            return logits
        rows, columns = self._tensor(masked).unbind(1)
        return logits.index_put((rows, columns), logits.new_tensor(-torch.inf))

    def _stop_token_ids(self, sampling: SamplingParams) -> Iterable[int]:
        eos_token_ids = frozenset() if sampling.ignore_eos else self._eos_token_ids
        return eos_token_ids.union(sampling.stop_token_ids)

    def _draw(
        self, logits: torch.Tensor, best: torch.Tensor, sequences: list[Sequence]
    ) -> torch.Tensor:
        """Draw one token per row. Shapes: logits [R, V], best [R]."""
        temperature = self._column(sequences, "temperature")
        # Relative to the best, so that a low temperature cannot overflow and nothing needs a sum.
        weights = ((logits - best[:, None]) / temperature).exp()
        weights = torch.where(weights >= self._column(sequences, "min_p"), weights, 0)
        self._check_order()
        masses = (weights * UNIT).to(torch.int64)
        return masses

    def _tensor(self, values: list[int] | list[tuple[int, int]]) -> torch.Tensor:
        return torch.tensor(values, device=self._device)

    def _column(self, sequences: list[Sequence], parameter: str) -> torch.Tensor:
        """One sampling parameter of each row: [R, 1]."""
        value = attrgetter(parameter)
        column = [[float(value(seq.sampling))] for seq in sequences]
        return torch.tensor(column, device=self._device)


def _has_penalty(sampling: SamplingParams) -> bool:
    return (
        sampling.repetition_penalty != 1
        or sampling.presence_penalty != 0
        or sampling.frequency_penalty != 0
    )
