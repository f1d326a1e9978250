"""A Ray of one machine that serves ``deploy/ray/serve.yaml``, sized for a small CPU."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

ROOT = Path(__file__).parent.parent.parent
RAY = ROOT / "deploy" / "ray"
MAX_ONGOING, MAX_QUEUED, NUM_METRICS_PORTS = 2, 8, 4
_MARK = "SPARSESERVE_TEST_CLUSTER"


def serve_config() -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((RAY / "serve.yaml").read_text())
    return config


def pod_environment() -> dict[str, str]:
    """What every Ray process of ``rayservice.yaml`` is told by its environment."""
    cluster = yaml.safe_load((RAY / "rayservice.yaml").read_text())["spec"]["rayClusterConfig"]
    [container] = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    return {variable["name"]: variable["value"] for variable in container["env"]}


class RayCluster:
    """Two replicas of the built-in model behind Ray's proxy; processes are known by a mark."""

    def __init__(self):
        self._mark = uuid.uuid4().hex
        self._folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # sockets: a short path
        ports = free_ports(2)
        self.http_port, gcs_port = ports
        self.metrics_port = free_run(NUM_METRICS_PORTS)
        self.url = f"http://127.0.0.1:{self.http_port}"
        self.client = httpx.Client(base_url=self.url, timeout=100)
        self._environment = {
            **os.environ,
            _MARK: self._mark,
            **pod_environment(),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT}:{RAY}",
            "RAY_DISABLE_IMPORT_WARNING": "1",
            "SPARSESERVE_DEVICE": "cpu",
            "SPARSESERVE_KV_CACHE_BYTES": str(64 * 2**20),
            "SPARSESERVE_MAX_STEP_TOKENS": "1024",
        }
        self._log = (self._folder / "log").open("w+")
        self._address = f"127.0.0.1:{gcs_port}"
        options = [
            "--head",
            "--block",
            f"--port={gcs_port}",
            "--node-ip-address=127.0.0.1",
            "--num-cpus=4",  # a name for room, not cores
            "--num-gpus=0",
            "--include-dashboard=false",
            "--include-log-monitor=false",
            "--object-store-memory=80000000",
            f"--temp-dir={self._folder}",
        ]
        self._head = self._start("ray", "start", *options)

    def config(self, **deployment_fields: Any) -> dict[str, Any]:
        """What is deployed in production, but with room for two cores, and impatient."""
        config = serve_config()
        config["http_options"] |= {"host": "127.0.0.1", "port": self.http_port}
        [application] = config["applications"]
        application["args"] = {
            "metrics_host": "127.0.0.1",
            "metrics_port": self.metrics_port,
            "max_replicas_per_node": NUM_METRICS_PORTS,
        }
        [deployment] = application["deployments"]
        del deployment["autoscaling_config"]
        deployment |= {
            "num_replicas": 2,
            "ray_actor_options": {"num_cpus": 1},
            "max_ongoing_requests": MAX_ONGOING,
            "max_queued_requests": MAX_QUEUED,
            "health_check_period_s": 1,
            "graceful_shutdown_wait_loop_s": 0.2,
            **deployment_fields,
        }
        return config

    def deploy(self, config: dict[str, Any]) -> None:
        """Hand a configuration to Serve, as ``serve run`` does, and return at once."""
        path = self._folder / "serve.yaml"
        path.write_text(yaml.safe_dump(config))
        address = ("--address", self._address)
        deadline = time.monotonic() + 60
        while True:
            command = self._start("serve", "run", "--non-blocking", *address, str(path))
            if command.wait(100) == 0:
                return
            assert time.monotonic() < deadline, self.log()
            time.sleep(1)

    def wait_replicas(self, count: int, timeout_s: float = 150) -> None:
        wait(lambda: len(self.replicas()) == count, timeout_s, self.log)
        wait(lambda: len(self.ready_scrapes()) == count, timeout_s, self.log)

    def replicas(self) -> list[int]:
        """Process ids of the replicas."""
        return [p.pid for p in self._processes() if "ServeReplica" in " ".join(_command(p))]

    def scrapes(self) -> list[str]:
        """The metrics of every replica, as a scraper that knows the ports gets them."""
        texts = []
        for port in range(self.metrics_port, self.metrics_port + NUM_METRICS_PORTS):
            # A port without a replica, or one whose replica ends just now; never a slow one.
            with contextlib.suppress(httpx.NetworkError, httpx.RemoteProtocolError):
                texts.append(httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=10).text)
        return texts

    def ready_scrapes(self) -> list[str]:
        return [text for text in self.scrapes() if "\nsparseserve_build_info{" in text]

    def metric(self, name: str, **labels: str) -> float:
        """Sum over replicas and over the samples that carry these labels."""
        return sum(value(text, name, **labels) for text in self.scrapes())

    def generate(self, prompt: str, *, params=None, **fields: Any) -> httpx.Response:
        body = {"prompt": prompt, "temperature": 0, **fields}
        return self.client.post("/generate", params=params or {}, json=body)

    def log(self) -> str:
        """All that was said, to be shown by a test that fails."""
        paths = sorted(self._folder.glob("session_latest/logs/serve/*.log"))
        texts = [f"== {path.name}\n{path.read_text()[-3000:]}" for path in paths]
        return "\n".join([(self._folder / "log").read_text(), *texts])[-20_000:]

    def close(self) -> None:
        self.client.close()
        started = psutil.Process(self._head.pid).children(recursive=True)
        self._head.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._head.wait(5)
        # Some overwrite their environment with a title, others were left by their parents.
        left = list({*started, *self._processes()})
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=10)
        self._head.wait(10)
        self._log.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        command = [str(Path(sys.executable).parent / program), *arguments]
        log = self._log
        return subprocess.Popen(command, env=self._environment, stdout=log, stderr=log, cwd="/")

    def _processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(_MARK) == self._mark:
                    found.append(process)
        return found


def value(text: str, name: str, **labels: str) -> float:
    """Sum of the samples of one scrape that carry these labels."""
    total = 0.0
    for found in re.finditer(rf"^sparseserve_{name}(?:{{(.*)}})? (\S+)$", text, re.MULTILINE):
        if all(f'{key}="{label}"' in (found[1] or "") for key, label in labels.items()):
            total += float(found[2])
    return total


def wait(condition, timeout_s=60.0, explain=lambda: ""):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def free_run(count: int) -> int:
    """First of so many free ports in a row, below those that the kernel hands out."""
    for first in range(20_464, 30_000, count):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise AssertionError("no ports are free")


def _command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []
