"""Chooses the next token of every sequence of a step.

A row's token never depends on the rows beside it: each sequence brings its own generator, and the
draw adds up integers, whose sum is the same in any order and any batch.
"""

import math
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch

from service.engine.sequence import SamplingParams, Sequence, TokenLogprob

# Mass of the likeliest token. Any vocabulary below 2^23 sums to less than 2^63, and a token loses
# its mass only if it is 10^12 times less likely than the likeliest.
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

    def __init__(self, prompt_ids: list[int], num_ids: int, device: torch.device) -> None:
        self.in_prompt = torch.zeros(num_ids, dtype=torch.bool, device=device)
        self.output_counts = torch.zeros(num_ids, device=device)
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
            logits: [S, V] of any float type, left untouched; columns beyond the vocabulary are
                padding and never chosen.
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
        histories = [self._history(seq, logits.shape[1]) for seq in chosen]
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

    def _history(self, seq: Sequence, num_ids: int) -> _History:
        history = self._histories.get(seq)
        if history is None:
            history = _History(seq.prompt_ids, num_ids, self._device)
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
            if 0 <= token_id < logits.shape[1]
        ]
        if not masked:
            return logits
        rows, columns = self._tensor(masked).unbind(1)
        return logits.index_put((rows, columns), torch.full((), -math.inf, device=self._device))

    def _stop_token_ids(self, sampling: SamplingParams) -> frozenset[int]:
        eos_token_ids: frozenset[int] = frozenset() if sampling.ignore_eos else self._eos_token_ids
        return eos_token_ids.union(sampling.stop_token_ids)

    def _draw(
        self, logits: torch.Tensor, best: torch.Tensor, sequences: list[Sequence]
    ) -> torch.Tensor:
        """Draw one token per row. Shapes: logits [R, V], best [R]."""
        tiny = torch.finfo(torch.float32).tiny
        temperature = self._column(sequences, "temperature").clamp_min(tiny)
        # Relative to the best, so that a low temperature cannot overflow and no sum is needed.
        weights = ((logits - best[:, None]) / temperature).exp()
        masses = (weights * UNIT).to(torch.int64)
        limited = [i for i, seq in enumerate(sequences) if self._is_limited(seq.sampling)]
        if limited:
            rows = self._tensor(limited)
            chosen = [sequences[i] for i in limited]
            masses = masses.index_put((rows,), self._limit(masses[rows], logits[rows], chosen))
        masses = torch.where(weights >= self._column(sequences, "min_p"), masses, 0)

        cumulative = masses.cumsum(dim=-1)
        total = cumulative[:, -1:]
        target = (self._uniforms(sequences) * total).to(torch.int64).minimum(total - 1)
        drawn = torch.searchsorted(cumulative, target, right=True)[:, 0]
        return drawn.clamp_max(logits.shape[1] - 1)  # a row that is not finite finds no place

    def _limit(
        self, masses: torch.Tensor, logits: torch.Tensor, sequences: list[Sequence]
    ) -> torch.Tensor:
        """Take their mass from tokens outside top-k and top-p. Shapes: both [R, V]."""
        order = logits.argsort(dim=-1, descending=True, stable=True)
        ranked = masses.gather(1, order)
        rank = torch.arange(ranked.shape[1], device=self._device)
        top_k = self._column(sequences, "top_k")
        ranked = torch.where((rank < top_k) | (top_k == 0), ranked, 0)

        cumulative = ranked.cumsum(dim=-1)
        nucleus = self._column(sequences, "top_p", torch.float64) * cumulative[:, -1:]
        # A token stays if those before it fall short of the nucleus; the first one always stays.
        stays = (cumulative - ranked < nucleus) | (rank == 0)
        return torch.empty_like(masses).scatter_(1, order, torch.where(stays, ranked, 0))

    def _is_limited(self, sampling: SamplingParams) -> bool:
        return 0 < sampling.top_k < self._vocab_size or sampling.top_p < 1

    def _uniforms(self, sequences: list[Sequence]) -> torch.Tensor:
        """One number in [0, 1) from each sequence's own generator: [R, 1]."""
        values = [
            [torch.rand((), dtype=torch.float64, generator=seq.generator).item()]
            for seq in sequences
        ]
        return torch.tensor(values, dtype=torch.float64, device=self._device)

    def _report(
        self, logits: torch.Tensor, token_ids: torch.Tensor, sequences: list[Sequence]
    ) -> list[TokenLogprob | None]:
        """Log-probabilities of the rows whose clients asked for them."""
        reports: list[TokenLogprob | None] = [None] * len(sequences)
        wanted = {
            i: seq.sampling.logprobs
            for i, seq in enumerate(sequences)
            if seq.sampling.logprobs is not None
        }
        if not wanted:
            return reports
        rows = self._tensor(list(wanted))
        logprobs = logits[rows].log_softmax(dim=-1)  # [R, V]
        own_ids = token_ids[rows]
        own = logprobs.gather(1, own_ids[:, None])[:, 0].tolist()
        best = logprobs.topk(min(max(wanted.values()), logits.shape[1]), dim=-1)
        best_ids, best_logprobs = best.indices.tolist(), best.values.tolist()
        for k, (i, token_id) in enumerate(zip(wanted, own_ids.tolist(), strict=True)):
            top = zip(best_ids[k][: wanted[i]], best_logprobs[k], strict=False)
            possible = tuple((t, logprob) for t, logprob in top if logprob > -math.inf)
            reports[i] = TokenLogprob(token_id, own[k], possible)
        return reports

    def _tensor(self, values: list[int] | list[tuple[int, int]]) -> torch.Tensor:
        return torch.tensor(values, device=self._device)

    def _column(
        self, sequences: list[Sequence], parameter: str, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """One sampling parameter of each row: [R, 1]."""
        column = [[getattr(seq.sampling, parameter)] for seq in sequences]
        return torch.tensor(column, dtype=dtype, device=self._device)


def _has_penalty(sampling: SamplingParams) -> bool:
    return (
        sampling.repetition_penalty != 1
        or sampling.presence_penalty != 0
        or sampling.frequency_penalty != 0
    )
