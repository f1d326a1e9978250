"""What an engine says of itself."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineStatus:
    """What probes and gauges need; reading it never waits for the engine."""

    loaded: bool
    is_alive: bool
    is_draining: bool
    is_stalled: bool
    reason: str
    num_running: int
    num_waiting: int
    num_pages_total: int
    num_pages_used: int
