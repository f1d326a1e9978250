"""Programs of Debian packages, unpacked beside the tests: neither root nor an install is needed."""

import shutil
import subprocess
from pathlib import Path

CACHE = Path(__file__).parent.parent.parent / ".cache" / "debian"


def program(name: str, package: str) -> str:
    """Path of a program: the one installed, or one from a package that is downloaded now.

    Raises:
        RuntimeError: apt could not download it; what it said is in the message.
    """
    installed = shutil.which(name)
    if installed:
        return installed
    root = CACHE / package
    found = [*root.glob(f"usr/bin/{name}"), *root.glob(f"usr/sbin/{name}")]
    if not found:
        unpack(package, root)
        found = [*root.glob(f"usr/bin/{name}"), *root.glob(f"usr/sbin/{name}")]
    return str(found[0])


def unpack(package: str, root: Path) -> None:
    """Download a package, by apt's lists or by new ones of our own, and unpack it into ``root``."""
    downloads = CACHE / "downloads"
    lists = CACHE / "lists"
    for folder in (root, downloads, lists / "partial"):
        folder.mkdir(parents=True, exist_ok=True)
    own = ["-o", f"Dir::State::lists={lists}", "-o", "APT::Sandbox::User="]
    _run("apt-get", *own, "update", cwd=downloads)
    _run("apt-get", *own, "download", package, cwd=downloads)
    [file] = downloads.glob(f"{package}_*.deb")
    _run("dpkg", "-x", str(file), str(root), cwd=downloads)


def _run(*command: str, cwd: Path) -> None:
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
