"""Until when sequences must have started, and until when they must have ended."""

import math
from collections.abc import Iterable

from service.engine.sequence import Sequence


class Deadlines:
    """Finds whose time is up, and looks at nobody before the first deadline has come."""

    def __init__(self) -> None:
        self._next = math.inf

    def watch(self, sequence: Sequence) -> None:
        """Mind the deadlines of a sequence that has not started."""
        self._next = min(self._next, _due(sequence))

    def expired(self, live: Iterable[Sequence], now: float) -> list[Sequence]:
        """Those of ``live``, which holds all that are watched and have not ended, that are due.

        ``now`` is of the monotonic clock.
        """
        if now < self._next:
            return []
        dues = [(sequence, _due(sequence)) for sequence in live]
        self._next = min((due for _, due in dues if due > now), default=math.inf)
        return [sequence for sequence, due in dues if due <= now]


def _due(sequence: Sequence) -> float:
    if sequence.first_scheduled_at is None:
        return min(sequence.queue_deadline, sequence.deadline)
    return sequence.deadline
