"""The command ``evaluate``: what each method costs in quality, and what it saves."""

from pathlib import Path
from typing import Annotated

import typer
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console

from service.errors import ServiceError
from service.options import OptionGroup, with_options
from service.settings import Settings
from service.terminal import LoadingBar
from sparse_methods import SparseMethodError

_NOT_OURS = (
    "method",
    "allow_evaluation_methods",
    "host",
    "port",
    "metrics_need_key",
    "max_body_bytes",
    "shutdown_timeout_s",
    "stall_timeout_s",
    "max_waiting_requests",
    "run_ahead",
    "tensor_parallel",
)
_WIDTH = 220  # of a table that no terminal bounds, characters


class EvaluateOptions(BaseModel):
    """What is measured, and where the results go."""

    model_config = ConfigDict(frozen=True)

    lengths: str = Field("2048,8192,16384", pattern=r"^\d+(,\d+)*$", description="Tokens.")
    text: Path | None = Field(
        None, description="UTF-8 text, or .jsonl(.xz) with 'text'; unset lets the model write."
    )
    samples: int = Field(40, ge=1, description="Prompts of each task.")
    windows: int = Field(8, ge=1, description="Windows of text.")
    decoded: int = Field(64, ge=1, description="Last tokens of a window, which are decoded.")
    seed: int = Field(0, ge=0, description="Of everything drawn.")
    output: Path | None = Field(None, description="JSON file, continued if it exists.")
    png: Path | None = Field(None, description="Picture of quality against density.")
    table: Path | None = Field(
        None,
        description="Measure nothing; print the rows of docs/methods.md (and draw) from this JSON.",
    )


@with_options(
    settings=OptionGroup(Settings, without=_NOT_OURS), options=OptionGroup(EvaluateOptions)
)
def evaluate(
    settings: Settings,
    options: EvaluateOptions,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--methods",
            "--method",
            help='Specs as name, name@v1 or name@v1{"knob": 1}; several by commas or by giving'
            " the option again. Default: every registered version.",
        ),
    ] = None,
) -> None:
    """Measure what each method costs in quality and what it leaves out."""
    from service.evaluation.report import methods_rows, save_picture
    from service.evaluation.results import read_document

    try:
        if options.table is not None:
            document = read_document(options.table)
            typer.echo(methods_rows(document))
            if options.png is not None:  # of a run on a machine that may have no matplotlib
                save_picture(options.png, document["cells"])
        else:
            _run(settings, options, methods or [])
    except (ServiceError, SparseMethodError, ValueError, OSError, ImportError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from None


def _run(settings: Settings, options: EvaluateOptions, methods: list[str]) -> None:
    # Imported here: torch and transformers take seconds, and --help should not.
    from service.engine.engine import Engine
    from service.engine.events import NoEvents
    from service.evaluation.evaluator import Evaluator, Plan
    from service.evaluation.report import check_picture, result_tables, save_picture
    from service.evaluation.results import Results
    from service.evaluation.specs import all_specs, parse_specs
    from service.models.loading import default_model_directory

    if options.png is not None:
        check_picture()  # now, not when all is measured
    plan = Plan(
        specs=parse_specs(methods) if methods else all_specs(),
        lengths=[int(length) for length in options.lengths.split(",")],
        num_samples=options.samples,
        num_windows=options.windows,
        num_decoded=options.decoded,
        seed=options.seed,
        text=options.text,
    )
    with LoadingBar(Console(stderr=True)) as bar:
        # Probes see every row that runs, so none may run whose sequence has ended, and every head.
        waiting = settings.model_copy(update={"run_ahead": False, "tensor_parallel": 1})
        engine = Engine.load(waiting, NoEvents(), bar)
        evaluator = Evaluator(engine, settings.model or default_model_directory(), plan)
        results = Results(options.output, evaluator.conditions(), evaluator.environment())
        cells = evaluator.run(results, lambda done, total: bar("cells", done, total))
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    for table in result_tables(cells):
        console.print(table)
    if plan.text is None:
        console.print("No --text was given: bits per byte are left out.")
    if options.png is not None:
        save_picture(options.png, results.cells)
