"""The process-wide state of transformers, borrowed for a moment and given back as it was."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from service.errors import ModelNotSupportedError

Progress = Callable[[str, int, int], None]  # stage, done, total

logger = logging.getLogger(__name__)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from writing to stderr; Python warnings become debug records of ours."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
    for warning in caught:
        logger.debug("%s: %s", warning.category.__name__, warning.message)


@contextmanager
def reported_progress(stage: str, progress: Progress | None) -> Iterator[None]:
    """Send the progress bars of transformers to ``progress`` instead of to the terminal."""

    def factory(_: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "_Bar":
        items = args[0] if args else kwargs.get("iterable")
        return _Bar(items, kwargs.get("total"), stage, progress)

    previous = transformers_logging.set_tqdm_hook(factory)
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(previous)


class _Bar:
    """Stands in for a tqdm bar."""

    def __init__(
        self,
        items: Any,  # noqa: ANN401 - whatever transformers iterates over
        total: int | None,
        stage: str,
        progress: Progress | None,
    ) -> None:
        self._items = items if items is not None else ()
        self._total = total if total is not None else _length(self._items)
        self._stage = stage
        self._progress = progress
        self._done = 0

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            yield item
            self.update()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Swallow what only a visible bar can do: close, refresh, set_postfix and the like."""
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_args, **_kwargs: None

    def update(self, n: int = 1) -> None:
        """Count ``n`` more items."""
        self._done += n
        if self._progress is not None:
            self._progress(self._stage, self._done, max(self._done, self._total))


def _length(items: Any) -> int:  # noqa: ANN401 - whatever transformers iterates over
    try:
        return len(items)
    except TypeError:
        return 0


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Route every attention layer of ``model`` through the implementation called ``name``.

    Raises:
        ModelNotSupportedError: The model's code does not use the attention interface.
    """
    with quiet():
        model.set_attn_implementation(name)
    if model.config._attn_implementation != name:  # noqa: SLF001 - no public way to read it
        raise ModelNotSupportedError(
            f"{type(model).__name__} does not use the attention interface of transformers, so its"
            " attention cannot be served from a paged cache. Serve a model that does, e.g. Llama."
        )


@contextmanager
def using_attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Switch the attention implementation for a moment.

    Configs are shared between submodels and mutated by the switch, so each one gets back exactly
    what it had.
    """
    before = [(config, config._attn_implementation) for config in _configs(model)]  # noqa: SLF001
    try:
        set_attention(model, name)
        yield
    finally:
        for config, implementation in before:
            # The public setter would also overwrite the configs nested in this one.
            config._attn_implementation_internal = implementation  # noqa: SLF001


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Every config object the model and its submodels read."""
    found: dict[int, PreTrainedConfig] = {}
    pending = [m.config for m in model.modules() if isinstance(m, PreTrainedModel)]
    while pending:
        config = pending.pop()
        if id(config) not in found:
            found[id(config)] = config
            nested = (getattr(config, name, None) for name in config.sub_configs)
            pending += [c for c in nested if isinstance(c, PreTrainedConfig)]
    return list(found.values())
