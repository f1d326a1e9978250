"""The manifests as they are in the files, and what they say put together."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

KUBERNETES = Path(__file__).parent.parent.parent / "deploy" / "kubernetes"
LABELS = {"app.kubernetes.io/name": "sparseserve"}


def objects(folder: str) -> Iterator[dict[str, Any]]:
    """Every object of the files in a folder, kustomizations aside."""
    for file in sorted((KUBERNETES / folder).glob("*.yaml")):
        if file.name != "kustomization.yaml":
            yield from yaml.safe_load_all(file.read_text())


def kustomization(folder: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(
        (KUBERNETES / folder / "kustomization.yaml").read_text()
    )
    return content


def one(folder: str, kind: str) -> dict[str, Any]:
    [found] = [item for item in objects(folder) if item["kind"] == kind]
    return found


def settings(folder: str) -> dict[str, str]:
    """Variables of the generated config map."""
    pairs = [
        literal.partition("=")
        for generator in kustomization(folder)["configMapGenerator"]
        for literal in generator["literals"]
    ]
    return {name: value for name, _, value in pairs}
