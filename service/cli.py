"""The command line: ``serve``, ``generate`` and ``methods``.

Options mirror ``Settings`` field by field; keys come from the environment only, where no other
user of the machine can read them.
"""

import asyncio
import inspect
import sys
from collections.abc import Callable
from functools import partial
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import typer
from pydantic import ValidationError
from rich.console import Console

from service.settings import Settings

app = typer.Typer(help="Serve a causal LM with sparse attention per request.", no_args_is_help=True)
_out, _err = Console(), Console(stderr=True)

_SECRET_FIELDS = {"api_keys"}
_SERVER_FIELDS = {
    "host", "port", "metrics_need_key", "max_body_bytes", "shutdown_timeout_s", "stall_timeout_s"
}  # fmt: skip


def with_settings(*, without: set[str]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command, whose first parameter is the settings, an option per field of them."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        fields = {n: f for n, f in Settings.model_fields.items() if n not in without}
        own = list(inspect.signature(command).parameters.values())[1:]
        options = [_option(name, field.annotation, field.description) for name, field in fields.items()]

        def run(**values: Any) -> None:  # noqa: ANN401 - whatever the options hold
            given = {n: values.pop(n) for n in fields}
            command(_settings(given), **values)

        run.__doc__ = command.__doc__
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in [*own, *options]]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


@app.command()
@with_settings(without=_SECRET_FIELDS)
def serve(settings: Settings) -> None:
    """Serve over HTTP; prints the address once requests are taken."""
    from service.api.console import Loading
    from service.engine.engine import Engine
    from service.logs import configure_logging
    from service.main import create_app
    from service.server import Server
