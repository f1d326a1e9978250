"""What kustomize makes of the manifests is valid by Kubernetes' own schemas, offline."""

import shutil
import subprocess

import pytest
import yaml

from tests.deploy.kubernetes import KUBERNETES, objects

VERSIONS = ("1.30", "1.35")
CUSTOM = {"ScaledObject", "ServiceMonitor", "PrometheusRule"}  # their schemas are not Kubernetes'
KUSTOMIZE = [["kubectl", "kustomize"], ["kustomize", "build"]]


@pytest.fixture
def check():
    import kubernetes_validate  # of the extra `ops`; here, so that others can be collected without

    def validate(item, version):
        kubernetes_validate.validate(item, version, strict=True)

    return validate


def kustomized(overlay):
    command = next((c for c in KUSTOMIZE if shutil.which(c[0])), None)
    if command is None:
        pytest.skip("NOT RUN: neither kubectl nor kustomize is on this machine")
    folder = KUBERNETES / "overlays" / overlay
    done = subprocess.run(
        [*command, str(folder)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("folder", ["base", "overlays/cpu", "overlays/gpu"])
def test_every_whole_object_is_valid_as_it_is(check, folder, version):
    for item in objects(folder):
        if item["kind"] == "Deployment":  # whole only when put together
            continue
        check(item, version)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("overlay", ["cpu", "gpu"])
def test_an_overlay_put_together_is_valid(check, overlay, version):
    items = kustomized(overlay)
    for item in items:
        if item["kind"] not in CUSTOM:
            check(item, version)
        else:
            assert overlay == "gpu"
    [deployment] = [item for item in items if item["kind"] == "Deployment"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    for kind, path in (("Service", "selector"), ("Deployment", "selector")):
        [item] = [item for item in items if item["kind"] == kind]
        selector = item["spec"][path]
        assert selector.get("matchLabels", selector).items() <= labels.items()
    pod = deployment["spec"]["template"]["spec"]
    names = {item["metadata"]["name"] for item in items if item["kind"] == "ConfigMap"}
    assert {source["configMapRef"]["name"] for source in pod["containers"][0]["envFrom"]} == names
    assert pod["serviceAccountName"] in {
        item["metadata"]["name"] for item in items if item["kind"] == "ServiceAccount"
    }


def test_a_mistake_is_seen(check):
    [deployment] = [item for item in objects("base") if item["kind"] == "Deployment"]
    deployment["spec"]["template"]["spec"]["terminationGracePeriod"] = 60
    with pytest.raises(Exception, match="terminationGracePeriod"):
        check(deployment, "1.35")
