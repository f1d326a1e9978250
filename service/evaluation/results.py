"""The file that results are kept in: written after each cell, continued by a rerun."""

import json
from pathlib import Path
from typing import Any

Cell = dict[str, Any]

_SCHEMA = 1
_IDENTITY = ("method", "version", "knobs", "length")


class Results:
    """Cells measured under one set of conditions.

    Args:
        path: JSON file; None keeps the cells in memory only.
        conditions: What must be equal for cells to be compared: model, text, seed and so on.
        environment: Where this run takes place; that of the file's first run is kept.

    Raises:
        ValueError: The file holds results of other conditions, or is no such file.
    """

    def __init__(
        self, path: Path | None, conditions: dict[str, Any], environment: dict[str, Any]
    ) -> None:
        self._path = path
        self._document: dict[str, Any] = {
            "schema": _SCHEMA,
            "environment": environment,
            "conditions": conditions,
            "cells": [],
        }
        if path is not None and path.exists():
            self._document = read_document(path)
            self._check(self._document["conditions"], conditions)

    @property
    def cells(self) -> list[Cell]:
        """Everything measured so far, also by earlier runs."""
        cells: list[Cell] = self._document["cells"]
        return cells

    def find(self, identity: Cell) -> Cell | None:
        """The cell of this method, version, knobs and length, if its code is still the same."""
        cell = next((c for c in self.cells if _is_same(c, identity)), None)
        return cell if cell and cell["content_hash"] == identity["content_hash"] else None

    def add(self, cell: Cell) -> None:
        """Keep a cell, in the place of an older one of the same identity, and write the file."""
        self._document["cells"] = [c for c in self.cells if not _is_same(c, cell)] + [cell]
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self._path.with_name(self._path.name + ".part")
        unfinished.write_text(json.dumps(self._document, indent=1) + "\n")
        unfinished.replace(self._path)  # a run that is killed leaves the old file whole

    def _check(self, found: dict[str, Any], conditions: dict[str, Any]) -> None:
        names = sorted(found.keys() | conditions.keys())
        differing = [name for name in names if found.get(name) != conditions.get(name)]
        if differing:
            shown = "; ".join(
                f"{n}: {found.get(n)} there, {conditions.get(n)} now" for n in differing
            )
            raise ValueError(
                f"{self._path} holds results that cannot be compared with these ({shown})."
                " Write to another file."
            )


def read_document(path: Path) -> dict[str, Any]:
    """Read a results file.

    Raises:
        ValueError: It is not one, or of another schema.
        OSError: It cannot be read.
    """
    try:
        document: Any = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(document, dict) or document.get("schema") != _SCHEMA:
        raise ValueError(f"{path} holds no evaluation results of schema {_SCHEMA}.")
    return dict(document)


def _is_same(cell: Cell, identity: Cell) -> bool:
    return all(cell[name] == identity[name] for name in _IDENTITY)
