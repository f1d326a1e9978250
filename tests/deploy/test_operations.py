"""The operator's page names only what exists."""

import re

import pytest

from service.metrics import Metrics
from service.planning import RUNTIME_BYTES
from tests.deploy.surface import COMMANDS, FLAGS, ROUTES, setting_of, variables
from tests.deploy.test_prometheus import RECORDS
from tests.dockerfile import ROOT
from tools.dashboard import metric_names

TEXT = (ROOT / "docs" / "operations.md").read_text()
OURS = set().union(*FLAGS.values())
OF_OTHERS = {"--build", "--build-arg", "--constraint", "--wheel-dir", "--no-index", "--find-links"}


def test_every_flag_is_one_of_a_command():
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", TEXT))
    assert len(flags) > 15
    assert flags - OF_OTHERS <= OURS


def test_every_command_exists():
    commands = set(re.findall(r"sparseserve (\w+) --", TEXT))
    assert commands
    assert commands <= set(COMMANDS)


def test_every_variable_is_a_setting():
    named = variables(TEXT)
    assert named
    for variable in named:
        setting_of(variable)


def test_every_metric_exists():
    prose = re.sub(r"#### \w+", "", TEXT)
    names = {name.rstrip(":") for name in metric_names(prose)}
    known = Metrics().labels.keys()
    families = {re.sub("_(bucket|sum|count)$", "", name) for name in known}
    assert names
    assert names <= known | families | RECORDS


@pytest.mark.parametrize("route", sorted(set(re.findall(r"`(?:GET )?(/[a-z_/.]+)`", TEXT))))
def test_every_route_exists(route):
    others = {"/docs", "/openapi.json", "/tmp", "/opt/sparseserve"}  # noqa: S108 - folders of the image
    assert route in ROUTES | others


def test_every_file_it_links_or_runs_exists():
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    named = re.findall(r"(?:deploy|tools)/[\w./-]+\w", TEXT)
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_what_is_assumed_is_said():
    assert f"{RUNTIME_BYTES // 2**30} GiB for CUDA itself" in TEXT
