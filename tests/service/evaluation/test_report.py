"""Tables, rows of the documentation, the picture, and the command around them."""

import builtins
import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from service.cli import app
from service.evaluation.report import methods_rows, result_tables, save_picture
from sparse_methods import get_sparse_method, list_sparse_methods

DOCS = Path(__file__).parent.parent.parent.parent / "docs" / "methods.md"


def cell(name, length, **knobs):
    method = get_sparse_method(name)(knobs)
    estimate = {"value": 0.975, "low": 0.871, "high": 0.996, "count": 40}
    return {
        "label": f"{name} v1",
        "method": name,
        "version": "v1",
        "knobs": method.knobs.model_dump(mode="json"),
        "length": length,
        "needle_1_of_16": estimate,
        "chain_of_3": estimate | {"low": None, "high": None},
        "prefill_density": 0.25,
        "decode_density": 1.0,
        "prefill_recall": 0.9,
        "prefill_seconds": length / 1000,
        "prefill_selection_share": None,
    }


CELLS = [cell("streaming", 2048), cell("streaming", 8192), cell("streaming", 9000, sink_blocks=9)]


def test_tables_show_values_with_intervals_and_leave_out_what_nobody_measured():
    console = Console(width=200, record=True, quiet=False)
    with console.capture() as captured:
        for table in result_tables(CELLS):
            console.print(table)
    text = captured.get()
    assert "97.5 [87.1, 99.6]" in text
    assert "8.192" in text
    assert "deciding" not in text


def test_a_row_holds_the_longest_measurement_of_the_default_knobs():
    rows = methods_rows({"cells": CELLS}).splitlines()
    assert len(rows) == 2 + sum(map(len, list_sparse_methods().values()))
    (row,) = [row for row in rows if row.startswith("| `streaming`")]
    assert "| 0.250 | 1.000 | 97.5 [87.1, 99.6] | - | 8.192 | 8192 |" in row
    (row,) = [row for row in rows if row.startswith("| `dense`")]
    assert row.endswith("| - | - | - | - | - | - |")


def test_the_documentation_has_a_row_for_every_version():
    text = DOCS.read_text()
    for name, versions in list_sparse_methods().items():
        for version in versions:
            assert (
                f"| `{name}` | {version} | {get_sparse_method(name, version).description()}" in text
            )


def test_a_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    save_picture(tmp_path / "out.png", CELLS)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_command_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    done = CliRunner().invoke(app, ["evaluate", "--png", "out.png"])
    assert done.exit_code == 1
    assert "sparseserve[plots]" in done.stderr


def test_the_command_prints_rows_and_draws_from_a_file(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"schema": 1, "cells": CELLS}))
    png = tmp_path / "out.png"
    done = CliRunner().invoke(app, ["evaluate", "--table", str(path), "--png", str(png)])
    assert done.stdout.strip() == methods_rows({"cells": CELLS})
    assert png.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "nothing"], "Unknown sparse method"),
        (["--table", "/nowhere.json"], "/nowhere.json"),
        (["--lengths", "2k"], "lengths"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_a_model_is_loaded(arguments, message):
    done = CliRunner().invoke(app, ["evaluate", *arguments])
    assert done.exit_code != 0
    assert message in done.stderr


def test_a_file_that_is_no_result_is_refused(tmp_path):
    path = tmp_path / "other.json"
    path.write_text("[]")
    done = CliRunner().invoke(app, ["evaluate", "--table", str(path)])
    assert done.exit_code == 1
    assert "no evaluation results" in done.stderr
