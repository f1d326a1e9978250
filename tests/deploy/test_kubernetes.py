"""Nothing in the manifests names a route, port, setting, metric or file that does not exist."""

from pathlib import Path

import pytest

from service.metrics import Metrics
from service.server import _FLUSH_S
from service.settings import Settings
from tests.deploy.kubernetes import KUBERNETES, LABELS, kustomization, objects, one, settings
from tests.deploy.surface import COMMANDS, ROUTES, setting_of, variables
from tests.dockerfile import stages
from tools.dashboard import metric_names

POD = one("base", "Deployment")["spec"]["template"]["spec"]
[CONTAINER] = POD["containers"]
OVERLAYS = ("overlays/cpu", "overlays/gpu")
FOLDERS = [str(f.parent.relative_to(KUBERNETES)) for f in KUBERNETES.rglob("kustomization.yaml")]
IMAGE = stages("cuda")["runtime"]


@pytest.mark.parametrize("kind", ["startupProbe", "readinessProbe", "livenessProbe"])
def test_a_probe_asks_a_route_that_exists_on_the_port_that_is_served(kind):
    request = CONTAINER[kind]["httpGet"]
    assert request["path"] in ROUTES
    [port] = [port for port in CONTAINER["ports"] if port["name"] == request["port"]]
    assert str(port["containerPort"]) == IMAGE.environment["SPARSESERVE_PORT"]


def test_only_readiness_may_see_a_server_that_drains_or_stalls():
    assert CONTAINER["livenessProbe"]["httpGet"]["path"] == "/health/live"
    assert CONTAINER["readinessProbe"]["httpGet"]["path"] == "/health/ready"
    startup = CONTAINER["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 600


def test_a_pod_is_given_longer_than_it_takes_to_drain():
    [sleep, seconds] = CONTAINER["lifecycle"]["preStop"]["exec"]["command"]
    drain = float(settings("base")["SPARSESERVE_SHUTDOWN_TIMEOUT_S"])
    assert sleep == "sleep"
    unready = CONTAINER["readinessProbe"]
    assert int(seconds) >= unready["periodSeconds"]
    assert POD["terminationGracePeriodSeconds"] >= int(seconds) + drain + _FLUSH_S + 10


def test_the_pod_may_do_nothing_that_it_does_not_need():
    context, pod = CONTAINER["securityContext"], POD["securityContext"]
    assert context == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["runAsNonRoot"]
    assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert f"{pod['runAsUser']}:{pod['runAsGroup']}" == IMAGE.last("USER").text
    assert POD["automountServiceAccountToken"] is False
    assert one("base", "NetworkPolicy")["spec"]["egress"] == []


def test_what_the_image_writes_is_on_a_volume():
    mounts = {mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    for name in ("HOME", "TRITON_CACHE_DIR"):
        assert any(Path(IMAGE.environment[name]).is_relative_to(mount) for mount in mounts)


def test_no_variable_of_the_cluster_can_be_taken_for_a_setting():
    assert one("base", "Service")["metadata"]["name"] == "sparseserve"  # hence SPARSESERVE_PORT
    assert POD["enableServiceLinks"] is False


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_sets_what_the_service_accepts(overlay, monkeypatch):
    values = settings("base") | settings(overlay)
    ours = {name: value for name, value in values.items() if name.startswith("SPARSESERVE_")}
    for name, value in ours.items():
        setting_of(name)
        monkeypatch.setenv(name, value)
    Settings()
    assert set(values) - set(ours) <= {"OMP_NUM_THREADS"}


def test_every_variable_that_a_manifest_names_is_a_setting():
    for file in KUBERNETES.rglob("*.yaml"):
        for variable in variables(file.read_text()):
            setting_of(variable)


def test_the_command_exists():
    assert CONTAINER["args"][0] in COMMANDS


def test_the_gpu_overlay_asks_for_one_gpu_and_mounts_what_it_serves():
    patch = next(o for o in objects("overlays/gpu") if o["kind"] == "Deployment")
    [container] = patch["spec"]["template"]["spec"]["containers"]
    assert container["name"] == CONTAINER["name"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    [mount] = container["volumeMounts"]
    assert Path(settings("overlays/gpu")["SPARSESERVE_MODEL"]).is_relative_to(mount["mountPath"])
    [volume] = patch["spec"]["template"]["spec"]["volumes"]
    claim = one("overlays/gpu", "PersistentVolumeClaim")["metadata"]["name"]
    assert volume["persistentVolumeClaim"]["claimName"] == claim


def test_every_selector_means_the_pods_of_the_deployment():
    [labels] = kustomization("base")["labels"]
    assert labels == {"pairs": LABELS, "includeSelectors": True}  # Deployment and Service
    [spread] = POD["topologySpreadConstraints"]
    for selector in (
        one("base", "PodDisruptionBudget")["spec"]["selector"],
        one("base", "NetworkPolicy")["spec"]["podSelector"],
        one("components/monitoring", "ServiceMonitor")["spec"]["selector"],
        spread["labelSelector"],
    ):
        assert selector["matchLabels"] == LABELS


def test_monitors_and_scalers_name_what_exists():
    [endpoint] = one("components/monitoring", "ServiceMonitor")["spec"]["endpoints"]
    ports = {port["name"] for port in one("base", "Service")["spec"]["ports"]}
    assert endpoint["port"] in ports
    assert endpoint["path"] in ROUTES
    scaled = one("components/autoscaling", "ScaledObject")["spec"]
    assert scaled["scaleTargetRef"]["name"] == one("base", "Deployment")["metadata"]["name"]
    [trigger] = scaled["triggers"]
    names = metric_names(trigger["metadata"]["query"].partition("{")[0])
    assert names == {"sparseserve_waiting_requests"}
    assert names <= Metrics().labels.keys()
    for port in one("base", "NetworkPolicy")["spec"]["ingress"][0]["ports"]:
        assert port["port"] in {p["name"] for p in CONTAINER["ports"]}


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_file_that_a_kustomization_names_exists_and_none_is_forgotten(folder):
    content = kustomization(folder)
    patches = [patch["path"] for patch in content.get("patches", ())]
    named = [*content.get("resources", ()), *content.get("components", ()), *patches]
    assert all((KUBERNETES / folder / name).exists() for name in named)
    files = {file.name for file in (KUBERNETES / folder).glob("*.yaml")}
    assert files - {"kustomization.yaml"} == {name for name in named if name.endswith(".yaml")}
