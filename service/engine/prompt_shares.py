"""What prompts may take of a step: beside those who decode, and of each other."""

import math
import sys
from collections.abc import Iterable

from service.engine.sequence import Sequence


class PromptShares:
    """Knows how fast prompts are computed, and who may have how much of a step.

    Args:
        block_size: Tokens of a block, the least that a prompt takes except at its end.
        max_prefill_s: Seconds that prompts may take in a step in which somebody decodes.

    Attributes:
        tokens_per_s: Pace of recent steps that computed prompts; 0 before the first.
    """

    def __init__(self, block_size: int, max_prefill_s: float) -> None:
        self._block_size = block_size
        self._max_prefill_s = max_prefill_s
        self._is_turn_of_oldest = False
        self.tokens_per_s = 0.0

    def note_pace(self, num_tokens: int, seconds: float) -> None:
        """Take note of how long a step took that computed prompts."""
        pace = num_tokens / max(seconds, 1e-6)
        # A mean of paces, not of times: one slow step, such as one that compiles, counts little.
        before = self.tokens_per_s or pace
        self.tokens_per_s = before + 0.3 * (pace - before)

    @property
    def tokens_beside_decoding(self) -> int:
        """Tokens that fit into a step beside those who decode, a block at least."""
        if self._max_prefill_s == math.inf or not self.tokens_per_s:
            return sys.maxsize
        return max(self._block_size, int(self._max_prefill_s * self.tokens_per_s))

    def share_of_oldest(self, budget: int) -> int:
        """Tokens kept for the oldest prompt: half; all of every other step if it is so little."""
        if budget >= 2 * self._block_size:
            return budget // 2
        self._is_turn_of_oldest = not self._is_turn_of_oldest
        return budget if self._is_turn_of_oldest else 0

    def is_computed_by(self, others: Iterable[Sequence], sequence: Sequence) -> bool:
        """Whether one of ``others`` computes the next page of a sequence, so that it need not.

        So the choices of a request compute its prompt once, and so do requests that come together.
        """
        index, prefix = sequence.num_computed_tokens // self._block_size, sequence.prefix
        if prefix is None or index >= prefix.num_reusable or sequence.num_own_tokens > 0:
            return False
        if sequence.num_computed_tokens >= sequence.most_cached_tokens:
            return False
        return any(
            other is not sequence
            and other.priority <= sequence.priority
            and other.num_computed_tokens // self._block_size <= index
            and other.prefix is not None
            and index < other.prefix.num_pages
            and other.prefix.key(index) == prefix.key(index)
            for other in others
        )
