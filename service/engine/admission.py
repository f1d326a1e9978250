"""Who may enter the queue: bounded in generations and in tokens, with a time to come back."""

import math

from service.engine.core import EngineCore
from service.engine.loop import EngineLoop
from service.errors import QueueFullError
from service.settings import Settings

_LONGEST_RETRY_S = 120  # clients of OpenAI's kind ignore what is longer


class Admission:
    """Decides at the door, before a request is encoded and again when its length is known.

    Args:
        settings: Bounds of the queue.
        num_cache_tokens: What the KV cache holds.
        core: Whose speed tells how long the queue takes.
        loop: Whose queue it is.
    """

    def __init__(
        self, settings: Settings, num_cache_tokens: int, core: EngineCore, loop: EngineLoop
    ) -> None:
        self._max_generations = settings.max_waiting_requests + settings.max_running_requests
        self._max_tokens = settings.max_waiting_tokens or 4 * num_cache_tokens
        self._core = core
        self._loop = loop

    def check(self, num_choices: int, num_tokens: int) -> None:
        """Refuse so many more generations, or their prompts of ``num_tokens`` tokens in all.

        Raises:
            QueueFullError: Too many generations, or tokens, wait already.
        """
        num_unfinished, num_waiting = self._loop.num_unfinished, self._loop.num_waiting_tokens
        if num_unfinished + num_choices > self._max_generations:
            raise QueueFullError(
                f"{num_unfinished} generations run or wait already; this server holds"
                f" {self._max_generations} at most. Retry later.",
                self.retry_after_s(),
            )
        if num_waiting > 0 and num_waiting + num_tokens > self._max_tokens:
            raise QueueFullError(  # an empty queue takes anything
                f"{num_waiting} tokens of prompts wait already; {num_tokens} more are too many for"
                f" this server's queue, which holds {self._max_tokens}. Retry later.",
                self.retry_after_s(),
            )

    def retry_after_s(self) -> int:
        """Seconds that the queue takes at the speed of recent steps, within reason."""
        speed = self._core.prompt_tokens_per_s
        seconds = self._loop.num_waiting_tokens / speed if speed else 0.0
        return max(1, min(math.ceil(seconds), _LONGEST_RETRY_S))
