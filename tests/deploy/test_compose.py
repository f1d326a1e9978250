"""What deploy/compose.yaml names is there, and its service is as confined as in the cluster."""

import re
from pathlib import Path

import pytest
import yaml

from service.server import _FLUSH_S
from service.settings import Settings
from tests.deploy.surface import ROUTES, setting_of
from tests.dockerfile import instructions, stages

DEPLOY = Path(__file__).parent.parent.parent / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
GPU = yaml.safe_load((DEPLOY / "compose.gpu.yaml").read_text())["services"]
SERVICE = COMPOSE["sparseserve"]
SCRAPE = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())["scrape_configs"][0]


@pytest.mark.parametrize("service", [SERVICE, GPU["sparseserve"]], ids=["cpu", "gpu"])
def test_its_settings_and_build_arguments_exist(service, monkeypatch):
    for name, value in service["environment"].items():
        setting_of(name)
        if not value.startswith("$"):
            monkeypatch.setenv(name, value)
    Settings()
    declared = {
        rest.partition("=")[0]
        for name, rest in instructions((DEPLOY.parent / "Dockerfile").read_text())
        if name == "ARG"
    }
    assert set(service["build"]["args"]) <= declared
    assert (DEPLOY / SERVICE["build"]["context"] / "Dockerfile").exists()


def test_the_service_is_confined_and_has_time_to_drain():
    assert SERVICE["read_only"] is True
    assert SERVICE["cap_drop"] == ["ALL"]
    # Without `exec`, which docker leaves out, Triton could not load what it compiles.
    assert SERVICE["tmpfs"][0].startswith("/tmp:exec")  # noqa: S108 - in the container
    grace = int(SERVICE["stop_grace_period"].removesuffix("s"))
    drain = float(SERVICE["environment"]["SPARSESERVE_SHUTDOWN_TIMEOUT_S"])
    assert grace >= drain + _FLUSH_S + 5


def test_ports_are_published_to_this_machine_only():
    for service in COMPOSE.values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    container_port = SERVICE["ports"][0].rpartition(":")[2]
    assert container_port == stages("cpu")["runtime"].environment["SPARSESERVE_PORT"]


def test_prometheus_scrapes_the_service_and_grafana_asks_prometheus():
    [target] = SCRAPE["static_configs"][0]["targets"]
    assert target.partition(":")[0] in COMPOSE
    assert target.partition(":")[2] == SERVICE["ports"][0].rpartition(":")[2]
    assert SCRAPE["metrics_path"] in ROUTES
    file = DEPLOY / "grafana/provisioning/datasources/prometheus.yml"
    [source] = yaml.safe_load(file.read_text())["datasources"]
    host, port = re.fullmatch(r"http://(\w+):(\d+)", source["url"]).groups()  # type: ignore[union-attr]
    assert COMPOSE[host]["ports"][0].endswith(f":{port}")


def test_what_is_mounted_exists_and_the_dashboard_lies_where_grafana_looks():
    mounted = {}
    for service in COMPOSE.values():
        for volume in service.get("volumes", ()):
            source, target, *_ = volume.split(":")
            mounted[target] = source
            assert not source.startswith(".") or (DEPLOY / source).is_dir()
    file = DEPLOY / "grafana/provisioning/dashboards/sparseserve.yml"
    [provider] = yaml.safe_load(file.read_text())["providers"]
    assert (DEPLOY / mounted[provider["options"]["path"]] / "sparseserve.json").exists()


def test_images_are_pinned_and_no_password_has_a_default():
    for service in COMPOSE.values():
        assert re.fullmatch(r"[\w/.-]+:v?\d+(\.\d+)+(-\w+)?", service["image"])
    assert COMPOSE["grafana"]["environment"]["GF_SECURITY_ADMIN_PASSWORD"].startswith("${")
