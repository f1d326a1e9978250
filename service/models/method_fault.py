"""Whose decision failed: a method that raises harms only the requests that chose it."""

from service.errors import GenerationError
from sparse_methods.method import SparseAttentionMethod


class MethodFaultError(GenerationError):
    """A method raised while it decided; the cause is what it raised.

    Attributes:
        method: The method, with its knobs.
        slot: Of the one request it decided for; None if it decided for several at once.
    """

    def __init__(self, method: SparseAttentionMethod, slot: int | None = None) -> None:
        name = f"{method.registered_name!r} {method.registered_version}"
        super().__init__(
            f"The sparse attention method {name} failed on this request; others still work."
        )
        self.method = method
        self.slot = slot
