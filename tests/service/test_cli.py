"""The command line, with an engine that says words."""

import os
import sys

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

import service.engine.engine
import service.server
from service.cli import app
from service.options import OptionGroup
from service.settings import Settings
from service.terminal import methods_markdown, methods_table
from sparse_methods import get_sparse_method, list_sparse_methods
from tests.service.fake_engine import WORDS, FakeEngine

runner = CliRunner()


@pytest.fixture(autouse=True)
def _the_process_goes_on(monkeypatch):
    """`serve` ends the whole process where a thread is still busy; here that is the tests' own."""
    monkeypatch.setattr(os, "_exit", sys.exit)


@pytest.fixture
def engine(monkeypatch):
    """Stands in for every engine the command loads; ``settings`` are those it was given."""
    fake = FakeEngine()

    def load(settings, _events, progress):
        progress("weights", 1, 2)
        progress("weights", 2, 2)
        fake.settings = settings
        return fake

    monkeypatch.setattr(service.engine.engine.Engine, "load", load)
    return fake


def test_generate_prints_the_text_and_then_the_table(engine: FakeEngine) -> None:
    done = runner.invoke(app, ["generate", "hello", "--max-tokens", "9", "--seed", "3"])
    assert done.exit_code == 0, done.output
    assert done.stdout == "".join(WORDS) + "\n"
    assert "Sparsity" in done.stderr
    assert "200 of 800" in done.stderr
    request = engine.requests[0]
    assert request.prompt == "hello"
    assert (request.sampling.max_tokens, request.sampling.seed) == (9, 3)
    assert engine.is_stopped


def test_generate_reads_standard_input_and_takes_knobs(engine: FakeEngine) -> None:
    options = ["--method", "streaming", "--version", "v1", "--knob", "window_blocks=3"]
    done = runner.invoke(app, ["generate", "-", *options], input="piped")
    assert done.exit_code == 0, done.output
    assert engine.requests[0].prompt == "piped"
    assert engine.requests[0].method.knobs.model_dump()["window_blocks"] == 3
    assert engine.settings.method == "streaming"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--method", "nope"], "Unknown sparse method"),
        (["--knob", "nope=1"], "no knob"),
        (["--knob", "nope"], "name=value"),
        (["--max-tokens", "0"], "--max-tokens"),
        (["--min-tokens", "999"], "min_tokens"),
        (["--device", "tpu"], "--device"),
        (["--port", "1"], "No such option"),
        (["--allow-evaluation-methods"], "No such option"),
    ],
)
def test_a_bad_option_is_refused_before_anything_loads(options, words, engine) -> None:
    done = runner.invoke(app, ["generate", "hello", *options])
    assert done.exit_code == 2
    assert words in " ".join(done.output.replace("│", " ").split())
    assert not engine.is_alive


def test_an_error_of_the_engine_is_one_line(engine: FakeEngine) -> None:
    done = runner.invoke(app, ["generate", "x" * 2000])
    assert done.exit_code == 1
    assert done.stderr.strip().endswith("Error: 2000 tokens do not fit into 1000.")


def test_methods_lists_every_version() -> None:
    listing, table = runner.invoke(app, ["methods"]), runner.invoke(app, ["methods", "--markdown"])
    assert listing.exit_code == table.exit_code == 0
    assert table.stdout.strip() == methods_markdown()
    for name, versions in list_sparse_methods().items():
        assert name in listing.stdout
        for version in versions:
            assert f"| `{name}` | {version} |" in table.stdout


def test_methods_tells_which_are_for_evaluation_only() -> None:
    rows = methods_markdown().splitlines()
    marked = {row.split("`")[1] for row in rows if "For evaluation only." in row}
    assert marked == {
        name for name in list_sparse_methods() if get_sparse_method(name).evaluation_only
    }
    assert "oracle_topk" in marked
    console = Console(width=300)
    with console.capture() as captured:
        console.print(methods_table())
    assert captured.get().count("For evaluation only.") == len(marked)


def test_every_setting_of_one_value_is_an_option() -> None:
    names = {parameter.name for parameter in OptionGroup(Settings).parameters()}
    assert names == set(Settings.model_fields) - {"api_keys", "cors_origins"}


def test_serve_passes_on_the_exit_code_and_the_address(engine, monkeypatch) -> None:
    class OneTick(service.server.Server):
        async def on_tick(self, counter):
            ended = await super().on_tick(counter)
            return ended or self._announce is None

    monkeypatch.setattr(service.server, "Server", OneTick)
    monkeypatch.setattr("service.logs.configure_logging", lambda _level, style: None)
    done = runner.invoke(app, ["serve", "--port", "0", "--method", "dense"])
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("http://127.0.0.1:")
    assert engine.settings.method == "dense"


def test_serve_says_why_the_model_could_not_be_loaded(monkeypatch) -> None:
    def load(*_):
        raise RuntimeError("no such model")

    monkeypatch.setattr(service.engine.engine.Engine, "load", load)
    monkeypatch.setattr("service.logs.configure_logging", lambda _level, style: None)
    done = runner.invoke(app, ["serve", "--port", "0"])
    assert done.exit_code == 1
    assert "no such model" in done.stderr


def test_an_option_never_shadows_the_environment(monkeypatch) -> None:
    monkeypatch.setenv("SPARSESERVE_PORT", "1234")
    group = OptionGroup(Settings)
    values = {parameter.name: None for parameter in group.parameters()}
    assert group.build({**values}).model_dump()["port"] == 1234
    assert group.build({**values, "port": 99}).model_dump()["port"] == 99
    with pytest.raises(typer.BadParameter):
        group.build({**values, "port": -1})
