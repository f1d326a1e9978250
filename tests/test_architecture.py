"""Budgets and promises that no linter holds."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("service", "sparse_methods")
SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def num_lines(path):
    return len(path.read_text().splitlines())


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_stays_within_its_budget(path):
    budget = 400 if path.parent.name == "kernels" else 300
    assert num_lines(path) <= budget


def test_the_project_stays_within_its_budget():
    assert sum(map(num_lines, SOURCES)) <= 26_000


def test_no_file_is_named_after_a_junk_drawer():
    junk = {"utils.py", "helpers.py", "common.py", "base.py", "types.py", "misc.py"}
    assert not [path for path in SOURCES if path.name in junk]


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("sparse_methods", ("fastapi", "transformers", "triton", "service")),
        ("service.settings", ("torch", "transformers", "fastapi")),
    ],
)
def test_importing_a_layer_does_not_import_what_it_must_not_know(module, forbidden):
    code = f"import sys, {module}; print([m for m in {forbidden!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"
