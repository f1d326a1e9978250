"""``sparseserve plan``: what of a model fits into a GPU, computed without one."""

from dataclasses import asdict
from typing import Annotated

import orjson
import typer
from rich.console import Console
from rich.table import Table

from service.errors import ServiceError
from service.options import OptionGroup, with_options
from service.settings import Settings

_SETTINGS = (
    "model",
    "dtype",
    "block_size",
    "max_context_tokens",
    "max_running_requests",
    "kv_cache_bytes",
    "kv_cache_memory_fraction",
)


@with_options(settings=OptionGroup(Settings, without=set(Settings.model_fields) - set(_SETTINGS)))
def plan(
    settings: Settings,
    gpu_memory: Annotated[str, typer.Option(help="Memory of the GPU, such as 80GiB.")],
    context: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of a sequence; unset takes the longest served."),
    ] = None,
    *,
    json: Annotated[bool, typer.Option("--json", help="Print numbers only, as JSON.")] = False,
) -> None:
    """Compute what of a model fits into a GPU: weights, KV cache, sequences at once."""
    # Imported here: torch and transformers take seconds, and --help should not.
    from service.planning import make_plan, parse_bytes

    try:
        result = make_plan(settings, parse_bytes(gpu_memory), context)
    except ServiceError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from None
    if json:
        typer.echo(orjson.dumps(asdict(result)).decode())
    else:
        Console().print(_table(asdict(result)))


def _table(numbers: dict[str, int | str]) -> Table:
    from service.planning import human_bytes

    table = Table(show_header=False)
    for name, value in numbers.items():
        is_size = "_bytes" in name and isinstance(value, int)
        shown = human_bytes(int(value)) if is_size else str(value)
        exact = f" ({value})" if is_size and name == "kv_bytes_per_token" else ""
        table.add_row(name.removeprefix("num_").replace("_", " "), shown + exact)
    return table
