"""``sparseserve calibrate``: fit the thresholds of methods to target sparsities of one model."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from service.errors import ServiceError
from service.options import OptionGroup, with_options
from service.settings import Settings
from service.terminal import LoadingBar
from sparse_methods import SparseMethodError

_TEXT_NAME = "calibration_text.txt"
_TEXTS_PER_LENGTH = 2
_SETTINGS = ("model", "device", "dtype", "fuse_modules", "block_size")


@with_options(settings=OptionGroup(Settings, without=set(Settings.model_fields) - set(_SETTINGS)))
def calibrate(
    settings: Settings,
    method: Annotated[
        str | None, typer.Option(help="Method to calibrate; unset takes all that can be.")
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="Long UTF-8 text to observe; the built-in model brings its own."),
    ] = None,
    lengths: Annotated[
        str, typer.Option(help="Prompt lengths to observe, tokens, separated by commas.")
    ] = "1024,2048,4096,8192,16384",
    output: Annotated[
        Path | None, typer.Option(help="File to write; unset is calibration.json of the model.")
    ] = None,
) -> None:
    """Fit thresholds to target sparsities of a model, and write them to a file."""
    # Imported here: torch and transformers take seconds, and --help should not.
    from service.calibration import calibratable, planted_texts
    from service.calibration import calibrate as calibrate_model
    from service.engine.tokenizer import Tokenizer
    from service.models.calibration_file import FILE_NAME
    from service.models.loading import load_model

    all_lengths = _lengths(lengths) * _TEXTS_PER_LENGTH
    try:
        methods = calibratable(method)
        source = _text(settings, text)
        with LoadingBar(Console(stderr=True)) as bar:
            loaded = load_model(
                settings.model, settings.device, settings.dtype, bar, fuse=settings.fuse_modules
            )
            tokenizer = Tokenizer.load(loaded.directory, loaded.eos_token_ids)
            texts = planted_texts(tokenizer.encode, source, all_lengths)
            artifact = calibrate_model(loaded, methods, texts, settings.block_size, bar)
        file = output or loaded.directory / FILE_NAME
        file.write_text(artifact.model_dump_json(indent=1) + "\n", encoding="utf-8")
    except (ServiceError, SparseMethodError, OSError, ValueError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from None
    for entry in artifact.methods:
        for phase, fits in entry.phases.items():
            fit = fits.model
            typer.echo(
                f"{entry.method} {entry.version} {phase}: r^2 {fit.r_squared:.3f},"
                f" {fit.num_points} points, sparsity {fit.min_sparsity:.2f}"
                f" to {fit.max_sparsity:.2f}"
            )
    typer.echo(str(file))


def _lengths(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise typer.BadParameter(f"{text[:64]!r} is no list of lengths.", param_hint="--lengths")
    return found


def _text(settings: Settings, text: Path | None) -> str:
    """The text to observe.

    Raises:
        ValueError: None is given, and the model has none of its own.
    """
    from service.models.loading import default_model_directory

    if text is None and settings.model is not None:
        raise ValueError("Give a long text that the model may see in service: --text FILE.")
    return (text or default_model_directory() / _TEXT_NAME).read_text(encoding="utf-8")
