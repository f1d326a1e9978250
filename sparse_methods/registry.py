"""Which class serves a method's name and version; discovery is by folder.

The public functions and their behaviour follow NVIDIA ModelOpt (commit 9e38041d3).
"""

import difflib
import functools
import importlib
import pkgutil
import re
import warnings
from collections.abc import Callable
from typing import TypeVar

from sparse_methods.errors import UnknownMethodError, UnknownVersionError
from sparse_methods.method import SparseAttentionMethod

MethodClass = TypeVar("MethodClass", bound=type[SparseAttentionMethod])

_registry: dict[str, dict[str, type[SparseAttentionMethod]]] = {}
_MAX_ECHO = 64  # characters of a client's spelling repeated in an error


def register_sparse_method(name: str, version: str = "v1") -> Callable[[MethodClass], MethodClass]:
    """Class decorator that files a method under a name and a version.

    Registering a taken (name, version) again warns with a RuntimeWarning and replaces.
    """

    def register(cls: MethodClass) -> MethodClass:
        versions = _registry.setdefault(name, {})
        if version in versions and versions[version] is not cls:
            message = f"Overriding existing sparse method {name!r} version {version!r}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        versions[version] = cls
        cls.registered_name, cls.registered_version = name, version
        return cls

    return register


def get_sparse_method(name: str, version: str | None = None) -> type[SparseAttentionMethod]:
    """Return the class of a method; no version means the latest by numeric parts (v10 > v2).

    Raises:
        UnknownMethodError: No method of this name (a ValueError).
        UnknownVersionError: The method has no such version (a ValueError).
    """
    versions = _versions(name)
    if version is None:
        return versions[latest_version(name)]
    if version not in versions:
        raise UnknownVersionError(
            f"Sparse method {name!r} has no version {_echo(version)}."
            f"{_nearest(version, list(versions))} Available versions: {sorted(versions)}."
        )
    return versions[version]


def list_sparse_methods() -> dict[str, list[str]]:
    """Every registered name with its versions, oldest first."""
    _discover()
    return {name: sorted(_registry[name], key=_numeric_parts) for name in sorted(_registry)}


def latest_version(name: str) -> str:
    """The version that ``get_sparse_method(name)`` stands for."""
    return max(_versions(name), key=_numeric_parts)


def _versions(name: str) -> dict[str, type[SparseAttentionMethod]]:
    _discover()
    if name not in _registry:
        raise UnknownMethodError(
            f"Unknown sparse method {_echo(name)}.{_nearest(name, list(_registry))}"
            f" Available methods: {sorted(_registry)}."
        )
    return _registry[name]


@functools.cache
def _discover() -> None:
    """Import every module of ``sparse_methods.methods``, each of which registers its class."""
    package = importlib.import_module("sparse_methods.methods")
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)


def _numeric_parts(version: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", version)] or [0]


def _nearest(given: str, known: list[str]) -> str:
    matches = difflib.get_close_matches(given[:_MAX_ECHO], known, n=1)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def _echo(given: str) -> str:
    return repr(given if len(given) <= _MAX_ECHO else given[:_MAX_ECHO] + "...")
