"""What the engine tells whoever counts: one call per event, from the engine thread."""

from typing import Protocol

from service.engine.sequence import Finish, Sequence


class EngineEvents(Protocol):
    """Receives the engine's events; every method must be quick and must not raise."""

    def step(self, phase: str, seconds: float, num_tokens: int) -> None:
        """A step ran; phase is prefill, decode or mixed."""

    def preempted(self) -> None:
        """A running generation gave way and will be recomputed."""

    def engine_error(self) -> None:
        """A step failed."""

    def finished(self, sequence: Sequence, finish: Finish) -> None:
        """A generation ended, aborted ones included."""

    def aborted(self, reason: str) -> None:
        """A generation was aborted: client or shutdown."""

    def first_token(self, sequence: Sequence, seconds: float) -> None:
        """A generation's first token came this long after its arrival."""

    def inter_token(self, seconds: float) -> None:
        """Time between two tokens of one generation."""

    def fell_back(self, sequence: Sequence, reason: str) -> None:
        """A generation runs dense instead of its method."""


class NoEvents:
    """Counts nothing."""

    def step(self, phase: str, seconds: float, num_tokens: int) -> None:
        """Ignore."""

    def preempted(self) -> None:
        """Ignore."""

    def engine_error(self) -> None:
        """Ignore."""

    def finished(self, sequence: Sequence, finish: Finish) -> None:
        """Ignore."""

    def aborted(self, reason: str) -> None:
        """Ignore."""

    def first_token(self, sequence: Sequence, seconds: float) -> None:
        """Ignore."""

    def inter_token(self, seconds: float) -> None:
        """Ignore."""

    def fell_back(self, sequence: Sequence, reason: str) -> None:
        """Ignore."""
