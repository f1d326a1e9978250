"""Nothing in deploy/ray or its page names what does not exist; needs no Ray to be installed."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.settings import Settings
from tests.deploy.surface import ROUTES, setting_of, variables

ROOT = Path(__file__).parent.parent.parent
RAY = ROOT / "deploy" / "ray"
PAGE = (ROOT / "docs" / "ray.md").read_text()


def load(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((RAY / name).read_text())
    return content


CONFIG, SERVICE, KUSTOMIZATION = (
    load("serve.yaml"),
    load("rayservice.yaml"),
    load("kustomization.yaml"),
)
[APPLICATION] = CONFIG["applications"]
[DEPLOYMENT] = APPLICATION["deployments"]
CLUSTER = SERVICE["spec"]["rayClusterConfig"]
HEAD = CLUSTER["headGroupSpec"]["template"]["spec"]
[WORKERS] = CLUSTER["workerGroupSpecs"]
WORKER = WORKERS["template"]["spec"]
[CONTAINER] = WORKER["containers"]
PORTS = {port["name"]: port["containerPort"] for port in CONTAINER["ports"]}


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    return names


def test_the_service_knows_nothing_of_ray():
    sources = [
        path for folder in ("service", "sparse_methods") for path in (ROOT / folder).rglob("*.py")
    ]
    assert not [path for path in sources if "ray" in imports(path)]


def test_kubernetes_deploys_what_serve_deploy_does():
    assert yaml.safe_load(SERVICE["spec"]["serveConfigV2"]) == CONFIG


def test_only_fields_that_kuberay_knows_are_set():
    """Its operator drops others without a word; these are of its v1 API, release 1.6."""
    assert (SERVICE["apiVersion"], SERVICE["kind"]) == ("ray.io/v1", "RayService")
    assert set(SERVICE["spec"]) == {
        "rayClusterDeletionDelaySeconds",
        "serveConfigV2",
        "rayClusterConfig",
    }
    assert set(CLUSTER) == {
        "rayVersion",
        "enableInTreeAutoscaling",
        "autoscalerOptions",
        "headGroupSpec",
        "workerGroupSpecs",
    }
    assert set(CLUSTER["autoscalerOptions"]) == {"idleTimeoutSeconds", "securityContext"}
    assert set(CLUSTER["headGroupSpec"]) == {"rayStartParams", "template"}
    sizes = {"replicas", "minReplicas", "maxReplicas"}
    assert set(WORKERS) == {"groupName", "rayStartParams", "template"} | sizes
    parameters = {**CLUSTER["headGroupSpec"]["rayStartParams"], **WORKERS["rayStartParams"]}
    assert all(isinstance(value, str) for value in parameters.values())


def test_the_application_is_imported_from_where_it_is_mounted():
    module, _, function = APPLICATION["import_path"].partition(":")
    tree = ast.parse((RAY / f"{module}.py").read_text())
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    files = {entry["name"]: entry.get("files") for entry in KUSTOMIZATION["configMapGenerator"]}
    for pod in (HEAD, WORKER):
        [container] = pod["containers"]
        [volume] = [v for v in pod["volumes"] if v["name"] == "application"]
        assert files[volume["configMap"]["name"]] == [f"{module}.py"]
        [mount] = [m for m in container["volumeMounts"] if m["name"] == "application"]
        assert {"name": "PYTHONPATH", "value": mount["mountPath"]} in container["env"]


def test_ports_are_those_that_are_listened_on():
    assert PORTS["serve"] == CONFIG["http_options"]["port"]
    assert PORTS["metrics"] == APPLICATION["args"]["metrics_port"]
    [endpoint] = load("podmonitor.yaml")["spec"]["podMetricsEndpoints"]
    assert PORTS[endpoint["port"]] == APPLICATION["args"]["metrics_port"]
    assert endpoint["path"] in ROUTES
    labels = load("podmonitor.yaml")["spec"]["selector"]["matchLabels"]
    assert labels.items() <= WORKERS["template"]["metadata"]["labels"].items()
    assert CONTAINER["readinessProbe"]["httpGet"]["port"] == "serve"


def test_rays_own_ports_are_open_to_its_pods_and_its_operator_only():
    policy = load("networkpolicy.yaml")["spec"]
    ours = policy["podSelector"]["matchLabels"]
    for pods in (CLUSTER["headGroupSpec"], WORKERS):
        assert ours.items() <= pods["template"]["metadata"]["labels"].items()
    everything, operator, clients, prometheus = policy["ingress"]
    assert everything["from"] == [{"podSelector": {"matchLabels": ours}}]
    assert operator["from"][0]["podSelector"]["matchLabels"].popitem()[1] == "kuberay-operator"
    assert clients["ports"] == [{"port": PORTS["serve"]}]
    assert prometheus["ports"] == [{"port": PORTS["metrics"]}]


def test_the_worker_has_what_its_replica_asks_for():
    wanted, given = DEPLOYMENT["ray_actor_options"], CONTAINER["resources"]
    assert given["limits"]["nvidia.com/gpu"] == wanted["num_gpus"]
    assert int(given["requests"]["cpu"]) >= wanted["num_cpus"]
    scaling = DEPLOYMENT["autoscaling_config"]
    assert (WORKERS["minReplicas"], WORKERS["maxReplicas"]) == (
        scaling["min_replicas"],
        scaling["max_replicas"],
    )
    assert CLUSTER["enableInTreeAutoscaling"] is True


def test_a_pod_and_an_old_cluster_outlive_the_drain():
    drain = DEPLOYMENT["graceful_shutdown_timeout_s"]
    [_, pause] = CONTAINER["lifecycle"]["preStop"]["exec"]["command"]
    assert WORKER["terminationGracePeriodSeconds"] >= drain + int(pause)
    assert SERVICE["spec"]["rayClusterDeletionDelaySeconds"] > drain


def test_replicas_are_kept_full_and_scaled_before_they_are():
    at_once = Settings.model_fields["max_running_requests"].default
    waiting = Settings.model_fields["max_waiting_requests"].default
    assert at_once < DEPLOYMENT["max_ongoing_requests"] <= at_once + waiting
    assert DEPLOYMENT["autoscaling_config"]["target_ongoing_requests"] < at_once


@pytest.mark.parametrize("spec", [HEAD, WORKER], ids=["head", "worker"])
def test_a_pod_may_do_nothing_that_it_does_not_need(spec):
    [container] = spec["containers"]
    assert spec["securityContext"]["runAsNonRoot"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert "/tmp" in {mount["mountPath"] for mount in container["volumeMounts"]}  # noqa: S108


def test_one_version_of_ray_is_named_everywhere():
    version = CLUSTER["rayVersion"]
    assert f'ray = ["ray[serve]=={version}"]' in (ROOT / "pyproject.toml").read_text()
    assert f"ray=={version}" in (ROOT / "constraints.txt").read_text().splitlines()


def test_settings_named_are_settings():
    literals = [
        s for entry in KUSTOMIZATION["configMapGenerator"] for s in entry.get("literals", [])
    ]
    settings = dict(literal.split("=", 1) for literal in literals)
    texts = [PAGE, *(path.read_text() for path in RAY.iterdir() if path.is_file())]
    named = {name for text in texts for name in variables(text)}
    assert settings.keys() <= named
    assert all(setting_of(name) for name in named)
    Settings(**{setting_of(name): value for name, value in settings.items()})


def test_the_page_says_which_settings_only_our_own_server_obeys():
    servers = {ROOT / "service" / "server.py", ROOT / "service" / "connection.py"}
    others = set((ROOT / "service").rglob("*.py")) - servers
    rest = "".join(path.read_text() for path in others)
    read = {n for path in servers for n in re.findall(r"settings\.([a-z_]+)", path.read_text())}
    # A meeting point of ranks has a port, too.
    lost = {n for n in read if not re.search(rf"(?<!welcome)(?<!meeting)\.{n}\b", rest)}
    [sentence] = re.findall(r"these have no meaning here: ([^.]+)\.", PAGE)
    assert {setting_of(name) for name in variables(sentence)} == lost
    assert lost


def test_files_named_on_the_page_and_by_kustomize_exist():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", PAGE):
        assert (ROOT / "docs" / link).exists(), link
    for resource in KUSTOMIZATION["resources"]:
        assert (RAY / resource).is_file()
    for name in re.findall(r"`((?:deploy|tests)/[\w./]+)`", PAGE):
        assert (ROOT / name).exists(), name


def test_numbers_on_the_page_are_those_of_the_configuration():
    for field in ("max_ongoing_requests", "max_queued_requests"):
        assert f"`{field}` ({DEPLOYMENT[field]})" in PAGE
    assert f"`metrics_port`\n({APPLICATION['args']['metrics_port']})" in PAGE
