"""What the Dockerfile says is known to work: linted, its steps executed, its command served."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from tests.dockerfile import ROOT, stages
from tests.e2e.conftest import free_port
from tests.ops import chroot

pytestmark = pytest.mark.timeout(900)


def test_hadolint_finds_nothing():
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run(
        [hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    if os.geteuid() != 0:
        pytest.skip("NOT EXECUTED: the Dockerfile's steps need root here, for chroot and mounts")
    debootstrap = "/usr/sbin/debootstrap"
    if not Path(debootstrap).exists():  # it finds its scripts by absolute paths: install it
        subprocess.run(["apt-get", "update"], check=True, capture_output=True, timeout=300)
        subprocess.run(
            ["apt-get", "install", "--yes", "--no-install-recommends", "debootstrap"],
            check=True,
            capture_output=True,
            timeout=300,
        )
    images = tmp_path_factory.mktemp("images")
    yield chroot.debian(debootstrap, images / "base")
    shutil.rmtree(images)  # gigabytes


def test_the_compiler_of_the_cuda_variant_builds_what_triton_builds(base):
    stage = stages("cuda")["runtime-cuda"]
    root = chroot.build(stage, base, {}, base.parent / "runtime-cuda")
    (root / "tmp/launcher.c").write_text(
        "#include <Python.h>\n#include <dlfcn.h>\nint launch(void) { return PY_MAJOR_VERSION; }\n"
    )
    compiled = (
        "cd /tmp && gcc launcher.c -O3 -shared -fPIC -o launcher.so"
        " $(python -c \"import sysconfig; print('-I' + sysconfig.get_path('include'))\")"
        " && python -c \"import ctypes; print(ctypes.CDLL('/tmp/launcher.so').launch())\""
    )
    done = chroot.run(root, ["/bin/sh", "-c", compiled], stage.environment, check=True)
    assert done.stdout.strip() == "3"
    assert not (root / "usr/bin/g++").exists()


@pytest.fixture(scope="module")
def image(base):
    """The CPU variant, built by its own steps."""
    found = stages("cpu")
    final = found["runtime"]
    built = {"build": chroot.build(found["build"], base, {}, base.parent / "build")}
    built["runtime-cpu"] = chroot.build(found[final.base], base, {}, base.parent / "runtime-cpu")
    root = chroot.build(final, built[final.base], built, base.parent / "runtime")
    return final, root


def test_a_server_started_as_the_image_starts_it_answers_on_a_read_only_root(image, capsys):
    stage, root = image
    assert not (root / "usr/bin/gcc").exists()
    user = stage.last("USER").text
    assert all(int(part) >= 1000 for part in user.split(":"))
    environment = stage.environment | {"SPARSESERVE_PORT": str(free_port())}
    url = f"http://127.0.0.1:{environment['SPARSESERVE_PORT']}"
    command = chroot.read_only(root, stage.command(), environment, user)
    log = root.parent / "server.log"
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    health = chroot.read_only(root, stage.health_command(), environment, user)
    try:
        deadline = time.monotonic() + 180
        while subprocess.run(health, check=False, capture_output=True).returncode:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(1)
        assert httpx.get(url + "/health/ready").status_code == 200
        body = {"prompt": "The old house stood", "max_tokens": 4}
        answer = httpx.post(url + "/generate", json=body, timeout=120).json()
        assert answer["usage"]["completion_tokens"] == 4
        status = Path(f"/proc/{server.pid}/status").read_text()
        assert f"Uid:\t{user.partition(':')[0]}" in status
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0, log.read_text()
    finally:
        if server.poll() is None:
            server.kill()
    assert subprocess.run(health, check=False, capture_output=True).returncode != 0
    sizes = {p: _size_mb(root / p) for p in ("opt/sparseserve", "usr")}
    with capsys.disabled():
        print(f"\nCPU variant, unpacked, on a stand-in base: {sizes} MB")  # noqa: T201 - a figure


def _size_mb(path: Path) -> int:
    done = subprocess.run(["du", "-sm", path], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[0])
