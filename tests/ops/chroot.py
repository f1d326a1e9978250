"""Executes the steps of the Dockerfile in folders that stand in for images; needs root.

The official Python image cannot be had without a registry of images: a minimal Debian with its own
Python takes its place. Everything else is what the Dockerfile says, word by word.
"""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

from tests.dockerfile import ROOT, Stage, Step

PACKAGES = "python3,python3-venv,python3-dev,ca-certificates"
_MOUNTS = "mount -t proc proc {0}/proc && mount --rbind /dev {0}/dev"
_READ_ONLY = "mount --bind {0} {0} && mount -o remount,ro,bind {0} && mount -t tmpfs tmpfs {0}/tmp"
_CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"


def debian(debootstrap: str, folder: Path) -> Path:
    """A minimal Debian with Python, named as the official image names it."""
    command = [debootstrap, "--variant=minbase", f"--include={PACKAGES}", _codename(), str(folder)]
    with (folder.parent / "debootstrap.log").open("w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT, timeout=500)
    for name, target in (("python", "python3"), ("python3", "python3")):
        (folder / "usr/local/bin" / name).symlink_to(f"/usr/bin/{target}")
    # This machine's ways to its registries, whatever they are.
    for file in ("/etc/resolv.conf", "/etc/hosts", _CERTIFICATES):
        shutil.copy(file, folder / file[1:])
    return folder


def build(stage: Stage, base: Path, built: dict[str, Path], folder: Path) -> Path:
    """Run the steps of a stage on a copy of its base."""
    subprocess.run(["cp", "--archive", "--reflink=auto", base, folder], check=True)
    directory = "/"
    for step in stage.steps:
        if step.name == "WORKDIR":
            directory = step.text
            (folder / directory[1:]).mkdir(parents=True, exist_ok=True)
        elif step.name == "COPY":
            _copy(step, folder, directory, built)
        elif step.name == "RUN":
            environment = stage.environment | stage.arguments
            script = f"cd {directory} && {step.text}"
            run(folder, ["/bin/sh", "-c", script], environment, check=True)
    return folder


def run(root, command, environment, *, check=False, timeout_s=600):
    """Run a command inside, as root, with this machine's settings of package clients."""
    ours = {k: v for k, v in os.environ.items() if k.startswith(("PIP_", "SSL_", "REQUESTS_"))}
    ours |= {key: value for key, value in environment.items() if value}
    done = subprocess.run(
        inside(root, command, ours, setup=_MOUNTS + _shared_wheels(root)),
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout_s,
    )
    if check and done.returncode:
        raise RuntimeError(f"{shlex.join(command)}:\n{(done.stdout + done.stderr)[-4000:]}")
    return done


def inside(root, command, environment, *, setup=_MOUNTS, user="0:0"):
    """The command line that runs ``command`` in ``root``, in mounts of its own."""
    variables = [f"{key}={value}" for key, value in ({"PATH": _path()} | environment).items()]
    chroot = ["chroot", f"--userspec={user}", str(root), "/usr/bin/env", "-i", *variables, *command]
    script = f"{setup.format(shlex.quote(str(root)))} && exec {shlex.join(chroot)}"
    return ["unshare", "--mount", "/bin/sh", "-c", script]


def read_only(root, command, environment, user):
    """The same as another user on a read-only root, where only /tmp can be written."""
    setup = f"{_READ_ONLY} && {_MOUNTS}"
    return inside(root, command, environment, setup=setup, user=user)


def _copy(step: Step, folder: Path, directory: str, built: dict[str, Path]) -> None:
    *sources, target = step.text.split()
    start = built[step.flags["from"]] if "from" in step.flags else ROOT
    target_path = folder / (target if target.startswith("/") else f"{directory}/{target}")[1:]
    for source in sources:
        path = start / source.lstrip("/")
        place = target_path / path.name if target.endswith("/") else target_path
        place.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "--archive", "--reflink=auto", path, place], check=True)


def _shared_wheels(root: Path) -> str:
    """Show the folders of wheels that pip is told to look into here."""
    found = [f for f in os.environ.get("PIP_FIND_LINKS", "").split() if Path(f).is_dir()]
    for place in found:
        (root / place[1:]).mkdir(parents=True, exist_ok=True)
    return "".join(f" && mount --bind {place} {{0}}{place}" for place in found)


def _codename() -> str:
    lines = Path("/etc/os-release").read_text().splitlines()
    return next(line.partition("=")[2] for line in lines if line.startswith("VERSION_CODENAME="))


def _path() -> str:
    return "/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin:/bin:/sbin"
