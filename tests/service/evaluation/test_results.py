"""The results file, when a run is interrupted."""

import json
from pathlib import Path

import pytest

from service.evaluation.results import Results, read_document

IDENTITY = {"method": "dense", "version": "v1", "knobs": {}, "length": 640, "content_hash": "a"}
OTHER = IDENTITY | {"method": "streaming"}


def test_an_interrupted_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "out.json"
    results = Results(path, {"seed": 0}, {})
    results.add(IDENTITY)
    write_text = Path.write_text

    def interrupted(file, text):
        write_text(file, text[: len(text) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        results.add(OTHER)
    monkeypatch.undo()
    assert json.loads(path.read_text())["cells"] == [IDENTITY]
    again = Results(path, {"seed": 0}, {})
    again.add(OTHER)
    assert read_document(path)["cells"] == [IDENTITY, OTHER]
    assert list(tmp_path.iterdir()) == [path]


def test_a_cell_of_other_code_is_measured_again_and_replaced(tmp_path):
    results = Results(tmp_path / "out.json", {}, {})
    results.add(IDENTITY)
    newer = IDENTITY | {"content_hash": "b"}
    assert results.find(IDENTITY) == IDENTITY
    assert results.find(newer) is None
    results.add(newer)
    assert read_document(tmp_path / "out.json")["cells"] == [newer]
