"""Chooses the next token of every sequence of a step.

A row's token never depends on the rows beside it: each sequence brings its own generator, and the
draw adds up integers, whose sum is the same in any order and any batch. Sampling never waits for
the device; what was chosen stays there and is on its way to the host when ``sample`` returns.
"""

import math
from weakref import WeakKeyDictionary

import torch

from service.engine.prompt_logprobs import FailedReport, PromptReport, prompt_reports
from service.engine.sampled import NO_TOKEN, LogprobReport, Sampled
from service.engine.scheduler import Chunk
from service.engine.sequence import SamplingParams, Sequence
from service.engine.transfer import to_device, to_host

# Mass of the likeliest token. Any vocabulary below 2^23 sums to less than 2^63, and a token loses
# its mass only if it is 10^12 times less likely than the likeliest.
UNIT = 2.0**40


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
        self.in_prompt.index_fill_(0, self._known(prompt_ids), value=True)

    def update(self, output_ids: list[int]) -> None:
        """Count output tokens that were not chosen here: all, when a history begins."""
        new = output_ids[self._num_counted :]
        if new:
            self._num_counted = len(output_ids)
            self._count(self._known(new))

    def choose(self, token_id: torch.Tensor) -> None:
        """Count the token [1] that was just chosen and that the host does not know yet."""
        self._num_counted += 1
        self._count(token_id.clamp_min(0))  # of a failed row, whose sequence ends

    def _count(self, token_ids: torch.Tensor) -> None:
        self.output_counts.index_add_(0, token_ids, torch.ones_like(token_ids, dtype=torch.float))

    def _known(self, token_ids: list[int]) -> torch.Tensor:
        ids = torch.tensor(token_ids, dtype=torch.int64)
        return to_device(ids[(ids >= 0) & (ids < len(self.in_prompt))], self.in_prompt.device)


class Sampler:
    """Samples one token per row of logits.

    Order: biases, penalties, minimum length, grammar, temperature, top-k, top-p, min-p, draw;
    log-probabilities are those of the untouched logits. Among equals the lowest id comes first.
    """

    def __init__(
        self, device: torch.device, vocab_size: int, eos_token_ids: frozenset[int] = frozenset()
    ) -> None:
        self._device = device
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        # Weak, because the sampler is not told when a sequence ends.
        self._histories: WeakKeyDictionary[Sequence, _History] = WeakKeyDictionary()

    def sample(self, logits: torch.Tensor, sequences: list[Sequence]) -> Sampled:
        """Choose the next tokens; sequences with a temperature advance their generators.

        Args:
            logits: [S, V] of any float type, left untouched; columns beyond the vocabulary are
                padding and never chosen.
            sequences: The sequence of each row. Each gets the token chosen for it, or ends.
        """
        raw = logits[:, : self._vocab_size]
        histories = {
            row: self._history(seq, raw.shape[1])
            for row, seq in enumerate(sequences)
            if _has_penalty(seq.sampling)
        }
        adjusted = self._penalise(self._bias(raw, sequences), histories, sequences)
        adjusted = self._mask_by_grammar(self._mask_stops(adjusted, sequences), sequences)
        best, token_ids = adjusted.max(dim=-1)  # first of equals; NaN if any is
        random_rows = [i for i, seq in enumerate(sequences) if seq.sampling.temperature > 0]
        if random_rows:
            rows = self._tensor(random_rows)
            chosen = [sequences[i] for i in random_rows]
            drawn = self._draw(adjusted[rows].float(), best[rows].float(), chosen)
            token_ids = token_ids.index_put((rows,), drawn)
        report = self._report(raw, token_ids, sequences)
        token_ids = torch.where(best.isfinite(), token_ids, NO_TOKEN)
        for row, history in histories.items():
            history.choose(token_ids[row : row + 1])
        return Sampled(token_ids, report)

    def report_prompts(
        self, logits: torch.Tensor, chunks: list[Chunk]
    ) -> list[PromptReport | FailedReport]:
        """Report the prompt rows [P, V] of a step; they arrive with what is sampled next."""
        return prompt_reports(logits[:, : self._vocab_size], chunks)

    def _bias(self, logits: torch.Tensor, sequences: list[Sequence]) -> torch.Tensor:
        biases = {
            (row, token_id): bias
            for row, seq in enumerate(sequences)
            for token_id, bias in seq.sampling.logit_bias
        }
        if not biases:
            return logits
        logits = logits.float()
        places = self._tensor(list(biases)).unbind(1)
        values = to_device(list(biases.values()), self._device, torch.float32)
        return logits.index_put(places, logits[places] + values)

    def _penalise(
        self, logits: torch.Tensor, histories: dict[int, _History], sequences: list[Sequence]
    ) -> torch.Tensor:
        if not histories:
            return logits
        chosen = [sequences[row] for row in histories]
        counts = torch.stack([history.output_counts for history in histories.values()])  # [R, V]
        is_new = counts == 0
        is_absent = is_new & ~torch.stack([history.in_prompt for history in histories.values()])

        logits = logits.float()
        rows = self._tensor(list(histories))
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
            if seq.num_output_tokens < seq.sampling.min_tokens
            for token_id in self._stop_token_ids(seq.sampling)
            if 0 <= token_id < logits.shape[1]
        ]
        if not masked:
            return logits
        rows, columns = self._tensor(masked).unbind(1)
        return logits.index_put((rows, columns), logits.new_full((), -math.inf))

    def _mask_by_grammar(self, logits: torch.Tensor, sequences: list[Sequence]) -> torch.Tensor:
        """Make impossible what a sequence's grammar does not allow behind its last token."""
        masks = {
            row: seq.matcher.allowed(seq.output_ids)[: logits.shape[1]]
            for row, seq in enumerate(sequences)
            if seq.matcher is not None
        }
        if not masks:
            return logits
        rows = self._tensor(list(masks))
        allowed = to_device(torch.stack(list(masks.values())), self._device)
        return logits.index_put((rows,), logits[rows].masked_fill(~allowed, -math.inf))

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
        return to_device(values, self._device, torch.float64)

    def _report(
        self, logits: torch.Tensor, token_ids: torch.Tensor, sequences: list[Sequence]
    ) -> LogprobReport | None:
        """Log-probabilities of the rows whose clients asked for them."""
        wanted = {
            i: seq.sampling.logprobs
            for i, seq in enumerate(sequences)
            if seq.sampling.logprobs is not None
        }
        if not wanted:
            return None
        rows = self._tensor(list(wanted))
        logprobs = logits[rows].float().log_softmax(dim=-1)  # [R, V]
        own = logprobs.gather(1, token_ids[rows][:, None])[:, 0]
        best = logprobs.topk(min(max(wanted.values()), logits.shape[1]), dim=-1)
        return LogprobReport(wanted, to_host(own), to_host(best.indices), to_host(best.values))

    def _tensor(self, values: list[int] | list[tuple[int, int]]) -> torch.Tensor:
        return to_device(values, self._device)

    def _column(
        self, sequences: list[Sequence], parameter: str, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """One sampling parameter of each row: [R, 1]."""
        column = [[getattr(seq.sampling, parameter)] for seq in sequences]
        return to_device(column, self._device, dtype)


def _has_penalty(sampling: SamplingParams) -> bool:
    return (
        sampling.repetition_penalty != 1
        or sampling.presence_penalty != 0
        or sampling.frequency_penalty != 0
    )
