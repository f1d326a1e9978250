"""What can be known of the image without building it; tests/ops executes its steps."""

import fnmatch
import re
import tomllib

import pytest

from service.settings import Settings
from tests.deploy.surface import ROUTES, setting_of
from tests.dockerfile import ROOT, Stage, stages

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(params=["cpu", "cuda"])
def variant(request) -> str:
    return str(request.param)


@pytest.fixture
def final(variant: str) -> Stage:
    return list(stages(variant).values())[-1]


def test_it_runs_as_a_user_with_a_number_that_is_not_roots(final: Stage) -> None:
    assert re.fullmatch(r"[1-9]\d{4,}:[1-9]\d{4,}", final.last("USER").text)


def test_its_variables_are_settings_that_are_accepted(final: Stage, monkeypatch) -> None:
    ours = {k: v for k, v in final.environment.items() if k.startswith("SPARSESERVE_")}
    assert ours
    for name, value in ours.items():
        setting_of(name)
        monkeypatch.setenv(name, value)
    assert Settings().port == int(final.last("EXPOSE").text)
    assert final.environment["TRITON_CACHE_DIR"].startswith("/tmp/")  # noqa: S108 - a tmpfs there
    assert final.environment["HOME"] == "/tmp"  # noqa: S108 - likewise


def test_its_probe_asks_a_route_of_its_port(final: Stage) -> None:
    probe = final.health_command()
    assert re.search(r"127\.0\.0\.1:{.*SPARSESERVE_PORT.*}(/[\w/]+)", probe[-1])[1] in ROUTES  # type: ignore[index]
    compile(probe[-1], "probe", "exec")


def test_it_starts_a_command_of_the_project_that_gets_signals_itself(final: Stage) -> None:
    program, command = final.command()
    assert program in PROJECT["scripts"]
    assert command == "serve"
    assert final.last("STOPSIGNAL").text == "SIGTERM"


def test_only_the_cuda_variant_has_a_compiler_and_it_cleans_up() -> None:
    for variant, installs in (("cpu", 0), ("cuda", 1)):
        base = stages(variant)[f"runtime-{variant}"]
        runs = [step.text for step in base.steps if step.name == "RUN"]
        assert len(runs) == installs
        assert all("--no-install-recommends gcc libc6-dev" in text for text in runs)
        assert all("rm -rf /var/lib/apt/lists/*" in text for text in runs)


def test_the_final_stage_takes_nothing_from_the_build_but_the_environment(final: Stage) -> None:
    copies = [step for step in final.steps if step.name == "COPY"]
    assert [(step.flags["from"], step.text) for step in copies] == [
        ("build", "/opt/sparseserve /opt/sparseserve")
    ]


def test_what_is_copied_exists_and_reaches_the_builder(variant: str) -> None:
    rules = (ROOT / ".dockerignore").read_text().split("\n")
    allowed = [rule[1:] for rule in rules if rule.startswith("!")]
    assert "*" in rules
    for step in stages(variant)["build"].steps:
        if step.name == "COPY":
            for source in step.text.split()[:-1]:
                name = source.removeprefix("./")
                assert (ROOT / name).exists()
                assert any(fnmatch.fnmatch(name, rule) for rule in allowed)


def test_the_extras_it_installs_exist() -> None:
    extras = stages("cuda")["build"].arguments["EXTRAS"].split(",")
    assert set(extras) <= set(PROJECT["optional-dependencies"])


def test_the_python_of_the_image_is_one_the_project_allows() -> None:
    minor = re.search(r"PYTHON_VERSION=3\.(\d+)", (ROOT / "Dockerfile").read_text())
    assert minor is not None
    assert PROJECT["requires-python"] == ">=3.11"
    assert int(minor[1]) >= 11
