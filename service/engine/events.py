"""What the engine tells whoever counts: one call per event, from the engine thread."""

from enum import StrEnum
from typing import Protocol

from service.engine.sequence import Finish, Sequence

ABORT_REASONS = ("client", "cancelled", "deadline", "shutdown", "death")


class FaultKind(StrEnum):
    """What failed; the label of the errors that are counted."""

    STEP = "step"  # a step, nobody in particular
    METHOD = "method"  # a sparse attention method
    MEMORY = "memory"
    NUMBERS = "numbers"  # logits that are not numbers
    TOKENIZER = "tokenizer"
    HANG = "hang"


class EngineEvents(Protocol):
    """Receives the engine's events; every method must be quick and must not raise."""

    def step(self, phase: str, seconds: float, num_tokens: int) -> None:
        """A step ran; phase is prefill, decode or mixed."""

    def preempted(self) -> None:
        """A running generation gave way and will be recomputed."""

    def engine_error(self, kind: FaultKind) -> None:
        """A step or a generation failed."""

    def finished(self, sequence: Sequence, finish: Finish) -> None:
        """A generation ended, aborted ones included."""

    def aborted(self, reason: str) -> None:
        """A generation was aborted, for one of ``ABORT_REASONS``."""

    def first_token(self, sequence: Sequence, seconds: float) -> None:
        """A generation's first token came this long after its arrival."""

    def inter_token(self, seconds: float) -> None:
        """Time between two tokens of one generation."""

    def fell_back(self, sequence: Sequence, reason: str) -> None:
        """A generation that ended ran dense, or otherwise than asked, for this cause."""


class NoEvents:
    """Counts nothing."""

    def step(self, phase: str, seconds: float, num_tokens: int) -> None:
        """Ignore."""

    def preempted(self) -> None:
        """Ignore."""

    def engine_error(self, kind: FaultKind) -> None:
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
