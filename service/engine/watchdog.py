"""Tells an engine that hangs from a process that stood still as a whole."""

import math
import time

_MAX_GAP_S = 5.0  # between two looks; after a longer one, it was not the engine that stood still


class Watchdog:
    """Bites once an engine has been seen without progress for too long.

    Args:
        limit_s: How long that is, in seconds.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._looked_at = self._looking_since = -math.inf

    def bites(self, idle_s: float) -> bool:
        """Look at an engine that last made progress ``idle_s`` seconds ago; do so often."""
        now = time.monotonic()
        if now - self._looked_at > _MAX_GAP_S:
            self._looking_since = now
        self._looked_at = now
        return min(idle_s, now - self._looking_since) > self._limit_s
