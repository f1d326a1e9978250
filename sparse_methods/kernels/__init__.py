"""One attention operation, several implementations; this module picks one.

An implementation asked for by name never falls back; ``auto`` takes the best that runs here.
"""

from collections.abc import Callable

from sparse_methods.errors import UnsupportedError
from sparse_methods.kernels import reference
from sparse_methods.kernels.operation import AttentionInputs, AttentionOutputs

Implementation = Callable[[AttentionInputs], AttentionOutputs]

IMPLEMENTATIONS: dict[str, Implementation] = {"reference": reference.attend}


def pick_implementation(name: str = "auto") -> tuple[str, Implementation]:
    """Return the name and the function of an implementation.

    Raises:
        UnsupportedError: No implementation of this name exists.
    """
    name = "reference" if name == "auto" else name
    if name not in IMPLEMENTATIONS:
        raise UnsupportedError(
            f"Unknown attention implementation {name!r}. Known: auto, {sorted(IMPLEMENTATIONS)}."
        )
    return name, IMPLEMENTATIONS[name]
