"""What Ray itself makes of ``deploy/ray``, and what a replica says of its health; no Ray runs."""

import asyncio
import importlib.util
import re
import socket
import types
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from service.errors import UnavailableError
from tests.ops.ray_cluster import RAY, ROOT, free_run, serve_config
from tests.service.fake_engine import FakeEngine

pytestmark = [pytest.mark.ops, pytest.mark.filterwarnings("ignore")]  # of Ray's own imports


@pytest.fixture(scope="module")
def application() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("sparseserve_ray", RAY / "sparseserve_ray.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_fields(content: dict[str, Any], model: type[BaseModel]) -> None:
    """Ray ignores fields that it does not know, so that a slip of the pen would do nothing."""
    assert content.keys() <= model.model_fields.keys()


def test_serve_accepts_the_configuration_and_knows_every_field_of_it():
    from ray.serve.config import AutoscalingConfig, BackpressureConfig
    from ray.serve.schema import (
        DeploymentSchema,
        HTTPOptionsSchema,
        RayActorOptionsSchema,
        ServeApplicationSchema,
        ServeDeploySchema,
    )

    config = serve_config()
    ServeDeploySchema.model_validate(config)
    [application] = config["applications"]
    [deployment] = application["deployments"]
    check_fields(config, ServeDeploySchema)
    check_fields(config["http_options"], HTTPOptionsSchema)
    check_fields(application, ServeApplicationSchema)
    check_fields(deployment, DeploymentSchema)
    check_fields(deployment["ray_actor_options"], RayActorOptionsSchema)
    check_fields(deployment["autoscaling_config"], AutoscalingConfig)
    check_fields(deployment["backpressure_config"], BackpressureConfig)


@pytest.mark.parametrize("version", ["1.30", "1.35"])
def test_pods_and_the_network_policy_are_valid_by_kubernetes_schemas(version):
    import kubernetes_validate

    cluster = yaml.safe_load((RAY / "rayservice.yaml").read_text())["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod", **group["template"]}
        kubernetes_validate.validate(pod, version, strict=True)
    policy = yaml.safe_load((RAY / "networkpolicy.yaml").read_text())
    kubernetes_validate.validate(policy, version, strict=True)


def test_rays_own_options_and_probes_exist():
    from ray.dashboard.modules.reporter import healthz_agent
    from ray.scripts.scripts import start

    cluster = yaml.safe_load((RAY / "rayservice.yaml").read_text())["spec"]["rayClusterConfig"]
    flags = {flag for option in start.params for flag in option.opts}
    source = Path(healthz_agent.__file__).read_text()
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert {f"--{name}" for name in group["rayStartParams"]} <= flags
        [container] = group["template"]["spec"]["containers"]
        path = container["livenessProbe"]["httpGet"]["path"]
        assert f'routes.get("{path}")' in source


def test_the_application_has_the_deployment_that_the_configuration_is_for(application):
    [config] = serve_config()["applications"]
    built = application.build(application.Arguments(**config["args"]))
    assert built._bound_deployment.name == config["deployments"][0]["name"]
    with pytest.raises(ValidationError):
        application.Arguments(metrics_prot=9464)


def test_the_sticky_router_of_the_page_exists():
    from ray.serve.config import RequestRouterConfig

    [block] = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "ray.md").read_text(), re.DOTALL)
    config = RequestRouterConfig(**yaml.safe_load(block)["request_router_config"])
    assert config.get_request_router_class().__name__ == "ConsistentHashRouter"


def test_a_replica_is_healthy_exactly_when_the_service_is_ready(application):
    class Holder:
        is_loaded, failure = False, None
        engine = FakeEngine()

        def status(self):
            return self.engine.status()

    async def check() -> list[str]:
        replica = application.Replica(application.Arguments())
        replica._holder = holder = Holder()
        replica._metrics = asyncio.create_task(asyncio.sleep(60))
        said = []
        first = asyncio.create_task(replica.check_health())
        await asyncio.sleep(0.3)
        assert not first.done(), "a replica that loads is neither healthy nor ill"
        holder.engine.start()
        holder.is_loaded = True
        await first
        holder.engine.is_alive = False
        with pytest.raises(UnavailableError, match="engine thread") as dead:
            await replica.check_health()
        said.append(str(dead.value))
        holder.engine.is_alive = True
        replica._metrics.cancel()
        await asyncio.wait([replica._metrics])
        with pytest.raises(UnavailableError, match="metrics"):
            await replica.check_health()
        holder.is_loaded, holder.failure = False, SystemExit("no such model")
        with pytest.raises(UnavailableError, match="no such model"):
            await replica.check_health()
        return said

    assert asyncio.run(check())


def test_replicas_of_a_node_take_ports_one_after_another(application):
    first = free_run(2)
    arguments = application.Arguments(metrics_port=first, max_replicas_per_node=2)
    taken: list[socket.socket] = []
    try:
        taken += [application._first_free_port(arguments) for _ in range(2)]
        assert [one.getsockname() for one in taken] == [
            ("127.0.0.1", first),
            ("127.0.0.1", first + 1),
        ]
        with pytest.raises(OSError, match="max_replicas_per_node"):
            application._first_free_port(arguments)
    finally:
        for one in taken:
            one.close()
