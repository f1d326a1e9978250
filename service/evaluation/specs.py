"""Which methods are asked for on the command line: ``name@version{"knob": value}``, several."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import orjson

from sparse_methods import SparseAttentionMethod, get_sparse_method, list_sparse_methods

_SEPARATORS = ",;"


@dataclass(frozen=True)
class MethodSpec:
    """A method to be measured.

    Attributes:
        label: Name, version and the knobs that were given.
    """

    method: SparseAttentionMethod
    label: str

    @property
    def knobs(self) -> dict[str, Any]:
        """All knobs, as JSON has them."""
        return self.method.knobs.model_dump(mode="json")


def all_specs() -> list[MethodSpec]:
    """Every registered version with its default knobs, dense first."""
    names = [f"{n}@{version}" for n, found in list_sparse_methods().items() for version in found]
    return [parse_spec(name) for name in sorted(names, key=lambda n: not n.startswith("dense@"))]


def parse_specs(texts: Iterable[str]) -> list[MethodSpec]:
    """Read lists of specs, separated by commas or semicolons outside of braces.

    Raises:
        ValueError: A spec cannot be read, or names no method, or has wrong knobs.
    """
    return [parse_spec(part) for text in texts for part in _split(text)]


def parse_spec(text: str) -> MethodSpec:
    """Read one spec; see ``parse_specs``."""
    head, brace, knobs = text.strip().partition("{")
    name, _, version = head.strip().partition("@")
    try:
        config = orjson.loads(brace + knobs) if brace else {}
    except orjson.JSONDecodeError as error:
        raise ValueError(f"The knobs of {text.strip()!r} are not JSON: {error}") from None
    method = get_sparse_method(name, version or None)(config)
    given = ", ".join(f"{key}={value}" for key, value in config.items())
    label = f"{name} {method.registered_version}" + (f" ({given})" if given else "")
    return MethodSpec(method, label)


def _split(text: str) -> Iterator[str]:
    depth, start = 0, 0
    for index, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0 and character in _SEPARATORS:
            yield text[start:index]
            start = index + 1
    if text[start:].strip():
        yield text[start:]
