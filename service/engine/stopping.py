"""Decides after each token whether a generation ends, and which of its text may be shown."""

from collections.abc import Sequence
from typing import NamedTuple

from service.engine.sequence import FinishReason, SamplingParams
from service.engine.tokenizer import TextStream, Tokenizer


class Ending(NamedTuple):
    """Why a generation ended.

    Attributes:
        stop_reason: The stop string or stop token id; None for end of sequence and length.
    """

    reason: FinishReason
    stop_reason: str | int | None = None


class StopChecker:
    """The stop rules of one generation, on its tokens and on its text.

    The first ``min_tokens`` tokens never end it, neither themselves nor by a stop string that is
    complete within their text.
    """

    def __init__(self, sampling: SamplingParams, eos_token_ids: frozenset[int]) -> None:
        self._sampling = sampling
        self._eos_token_ids = frozenset() if sampling.ignore_eos else eos_token_ids
        self._stop = tuple(filter(None, sampling.stop))
        self._num_held = max(map(len, self._stop), default=1) - 1
        self._num_tokens = 0
        self._held = ""

    def check_token(self, token_id: int) -> Ending | None:
        """Count a token; returns the ending if the token itself brings it."""
        self._num_tokens += 1
        if self._may_stop and token_id in self._eos_token_ids:
            return Ending(FinishReason.STOP)
        if self._may_stop and token_id in self._sampling.stop_token_ids:
            return Ending(FinishReason.STOP, token_id)
        if self._num_tokens >= self._sampling.max_tokens:
            return Ending(FinishReason.LENGTH)
        return None

    def check_text(self, text: str) -> tuple[str, Ending | None]:
        """Take text of the tokens counted so far.

        Returns:
            What may be shown: all but the last characters, which could begin a stop string; and
            the ending if one is complete, in which case the text ends before it.
        """
        num_searched = len(self._held)
        self._held += text
        found = self._find_stop(num_searched) if self._may_stop else None
        if found is not None:
            start, stop = found
            shown, self._held = self._held[:start], ""
            return shown, Ending(FinishReason.STOP, stop)
        num_shown = max(0, len(self._held) - self._num_held)
        shown, self._held = self._held[:num_shown], self._held[num_shown:]
        return shown, None

    def release(self) -> str:
        """Give up waiting for a stop string; returns the text held back."""
        held, self._held = self._held, ""
        return held

    @property
    def _may_stop(self) -> bool:
        return self._num_tokens > self._sampling.min_tokens

    def _find_stop(self, num_searched: int) -> tuple[int, str] | None:
        """Start of the stop string that ends first, the longest of those, behind what was seen."""
        ends = []
        for stop in self._stop:
            start = self._held.find(stop, max(0, num_searched - len(stop) + 1))
            if start >= 0:
                ends.append((start + len(stop), start, stop))
        return min(ends)[1:] if ends else None


class OutputBuilder:
    """The visible output of one generation, built token by token.

    A token that ends the generation adds no text; one cut off by ``max_tokens`` does. The tail
    that waited for the rest of a character is flushed before the last search for stop strings, so
    that a stop string which only the tail completes still counts.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], sampling: SamplingParams
    ) -> None:
        self._stream = TextStream(tokenizer, prompt_ids)
        self._checker = StopChecker(sampling, tokenizer.eos_token_ids)

    def push(self, token_id: int) -> tuple[str, Ending | None]:
        """Add one token; returns the new text to show and the ending, if this is it."""
        ending = self._checker.check_token(token_id)
        is_hidden = ending is not None and ending.reason is FinishReason.STOP
        text = "" if is_hidden else self._stream.push((token_id,))
        if ending is not None:
            text += self._stream.finish()
        shown, stop = self._checker.check_text(text)
        if ending is not None and stop is None:
            shown += self._checker.release()
        return shown, stop or ending

    def abort(self) -> str:
        """End the generation from outside; returns the text held back."""
        shown, stop = self._checker.check_text(self._stream.finish())
        return shown if stop else shown + self._checker.release()
