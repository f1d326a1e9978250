"""The modules of a model that compute in fewer kernels; they can give their forwards back."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from service.models.matching import Forward


class Fusions:
    """The modules of one model that compute with fewer kernels."""

    def __init__(self) -> None:
        self._forwards: dict[nn.Module, Forward] = {}

    def install(self, forwards: dict[nn.Module, Forward]) -> None:
        """Let the modules compute this from now on."""
        for module, forward in forwards.items():
            module.forward = forward
        self._forwards |= forwards

    def remove(self) -> None:
        """Let the modules compute for good what they did before surgery."""
        for module in self._forwards:
            del module.forward
        self._forwards = {}

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The modules that were taken."""
        return tuple(self._forwards)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Let the modules compute what they did before surgery, for a moment."""
        for module in self._forwards:
            del module.forward
        try:
            yield
        finally:
            self.install(self._forwards)
