"""The command line: ``serve``, ``generate``, ``methods`` and, by files of their own, the rest.

Options are made from the fields of ``Settings`` and of the HTTP request. API keys come from the
environment only, where other users of the machine cannot read them.
"""

import asyncio
import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import orjson
import typer
from rich.console import Console

from service.api.schemas import SamplingFields
from service.cli_calibrate import calibrate
from service.cli_evaluate import evaluate
from service.cli_plan import plan
from service.errors import ServiceError
from service.options import OptionGroup, with_options
from service.settings import Settings
from service.terminal import LoadingBar, methods_markdown, methods_table, sparsity_table
from sparse_methods import SparseAttentionMethod, SparseMethodError, get_sparse_method

if TYPE_CHECKING:
    from service.engine.engine import Engine
    from service.engine.events import EngineEvents
    from service.engine.sequence import SamplingParams

app = typer.Typer(
    help="Serve a causal LM whose sparse attention method each request chooses.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,  # locals may hold a prompt
)

app.command()(calibrate)
app.command()(evaluate)
app.command()(plan)

_HTTP_ONLY = (
    "allow_evaluation_methods",  # whoever runs a command is the operator
    "host",
    "port",
    "metrics_need_key",
    "vllm_metric_aliases",
    "max_body_bytes",
    "max_connections",
    "client_timeout_s",
    "exit_on_engine_death",
    "shutdown_timeout_s",
    "log_format",
    "traces_endpoint",
)


@app.command()
@with_options(settings=OptionGroup(Settings))
def serve(settings: Settings) -> None:
    """Serve over HTTP; prints the address as soon as requests are taken."""
    # Imported here: torch and transformers take seconds, and --help should not.
    from service.engine.engine import Engine
    from service.logs import configure_logging
    from service.main import create_app
    from service.server import Server

    _resolve(settings.method, None, {})
    configure_logging(settings.log_level, style=settings.log_format)
    with LoadingBar(Console(stderr=True)) as bar:

        def load(events: "EngineEvents") -> Engine:
            return Engine.load(settings, events, bar)

        def announce(address: str) -> None:
            bar.stop()
            typer.echo(address)

        try:
            fastapi_app = create_app(settings, load)
        except ServiceError as error:
            raise typer.BadParameter(str(error)) from None
        server = Server(settings, fastapi_app, announce)
        server.run()
    holder = fastapi_app.state.holder
    if holder.failure is not None:
        typer.echo(f"The model could not be loaded: {holder.failure}", err=True)
    # torch aborts the process if the interpreter ends under a thread of it; where ranks share the
    # model, a thread may wait for one that is lost.
    if holder.is_busy or settings.tensor_parallel > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(server.exit_code)
    raise typer.Exit(server.exit_code)


@app.command()
@with_options(
    settings=OptionGroup(Settings, without=_HTTP_ONLY),
    sampling=OptionGroup(SamplingFields, without=("n",)),
)
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to complete; - reads standard input.")],
    settings: Settings,
    sampling: SamplingFields,
    version: Annotated[str | None, typer.Option(help="Version of the method.")] = None,
    knob: Annotated[list[str] | None, typer.Option(help="A knob as name=value.")] = None,
) -> None:
    """Complete one prompt here, and show what attention left out."""
    from service.engine.engine import Engine
    from service.engine.events import NoEvents

    method = _resolve(settings.method, version, dict(_knob(text) for text in knob or []))
    text = sys.stdin.read() if prompt == "-" else prompt
    try:
        with LoadingBar(Console(stderr=True)) as bar:
            engine = Engine.load(settings, NoEvents(), bar)
        engine.start()
        try:
            asyncio.run(_stream(engine, method, sampling.sampling(), text))
        finally:
            engine.stop()
    except (ServiceError, SparseMethodError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from None


@app.command()
def methods(
    *,
    markdown: Annotated[bool, typer.Option(help="Print the table of the README.")] = False,
) -> None:
    """List every sparse attention method with its versions and knobs."""
    if markdown:
        typer.echo(methods_markdown())
    else:
        Console().print(methods_table())


async def _stream(
    engine: "Engine", method: SparseAttentionMethod, sampling: "SamplingParams", prompt: str
) -> None:
    from service.engine.generation import GenerationRequest

    request = GenerationRequest(
        request_id="cli", prompt=prompt, prompt_ids=None, method=method, sampling=sampling
    )
    async with await engine.submit(request) as generation:
        async for _, update in generation:
            typer.echo(update.text, nl=False)
            if update.finish is None:
                continue
            timing, num_tokens = update.finish.timing, update.finish.num_generated_tokens
            typer.echo()
            console = Console(stderr=True)  # so that the text alone can be piped
            console.print(sparsity_table(update.finish.statistics))
            console.print(
                f"{len(generation.prompt_ids)} prompt tokens, {num_tokens} new tokens;"
                f" first after {timing.time_to_first_token_s:.3f} s, all after"
                f" {timing.total_s:.3f} s; {method.registered_name} {method.registered_version}",
                highlight=False,
            )


def _resolve(name: str, version: str | None, knobs: dict[str, Any]) -> SparseAttentionMethod:
    try:
        return get_sparse_method(name, version)(knobs)
    except SparseMethodError as error:
        raise typer.BadParameter(str(error), param_hint="--method") from None


def _knob(text: str) -> tuple[str, Any]:
    """Split name=value; the value is JSON if it can be read as such, else a string."""
    name, sign, value = text.partition("=")
    if not sign:
        raise typer.BadParameter(f"{text[:64]!r} is not of the form name=value.")
    try:
        return name, orjson.loads(value)
    except orjson.JSONDecodeError:
        return name, value


if __name__ == "__main__":
    app()
