"""What is committed is what the tools write."""

from pathlib import Path

import pytest

from tools.deploy_files import generated


@pytest.mark.parametrize(("path", "content"), generated().items(), ids=lambda v: Path(v).name[:40])
def test_the_committed_file_is_the_generated_one(path: Path, content: str) -> None:
    assert path.read_text() == content, "run `python -m tools.deploy_files`"
