"""What the project really has, for tests that read what is written about it elsewhere."""

import re

from typer.main import get_command

from service.cli import app
from service.settings import Settings
from tests.service.fake_engine import FakeEngine, fake_app

PREFIX = "SPARSESERVE_"
ROUTES = set(fake_app(FakeEngine()).openapi()["paths"])
COMMANDS = get_command(app).commands  # type: ignore[attr-defined]
FLAGS = {
    name: {
        flag
        for parameter in command.params
        for flag in (*parameter.opts, *parameter.secondary_opts)
    }
    for name, command in COMMANDS.items()
}


def setting_of(variable: str) -> str:
    """The setting an environment variable is for; fails if there is none."""
    name = variable.removeprefix(PREFIX).lower()
    assert name in Settings.model_fields, f"{variable} is no setting"
    return name


def variables(text: str) -> set[str]:
    """Environment variables of ours that a text names."""
    return set(re.findall(r"\bSPARSESERVE_[A-Z0-9_]+\b", text))
