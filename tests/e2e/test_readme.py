"""The README is executed: its commands, its Python, its output, its table."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(300)  # real prompts on two slow cores

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
SHELL = [code for language, code in BLOCKS if language == "sh"]


def run(arguments):
    done = subprocess.run(
        arguments, capture_output=True, text=True, cwd=ROOT, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def is_part(expected, actual):
    """Whether every key shown is in the answer with the value shown, rounded as shown."""
    if isinstance(expected, dict):
        return all(key in actual and is_part(expected[key], actual[key]) for key in expected)
    if isinstance(expected, float):
        return expected == pytest.approx(actual, abs=2e-3)
    return bool(expected == actual)


def test_the_curl_commands_work_and_print_what_the_readme_shows(server):
    answers = [
        json.loads(run(shlex.split(code.replace("localhost:8000", f"127.0.0.1:{server.port}"))))
        for code in SHELL
        if code.startswith("curl")
    ]
    assert len(answers) == 5
    [shown] = [json.loads(code) for language, code in BLOCKS if language == "json"]
    assert is_part(shown, answers[0])
    assert answers[1]["sparsity"]["params"]["window_blocks"] == 2
    assert answers[1]["usage"]["completion_tokens"] == 8
    assert answers[2]["sparsity"]["params"]["target_sparsity"] is not None
    assert answers[3]["method"] == "hybrid"
    assert answers[4]["choices"][0]["message"]["role"] == "assistant"
    assert answers[4]["sparsity"]["method"] == "streaming"


def test_the_terminal_command_prints_text_and_a_sparsity_table():
    [command] = [code for code in SHELL if code.startswith("sparseserve")]
    arguments = shlex.split(command)[1:]
    done = subprocess.run(
        [sys.executable, "-m", "service.cli", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=280,
        check=True,
    )
    assert len(done.stdout.split()) >= 5
    assert "density" in done.stderr.lower()


def test_the_python_block_runs():
    [code] = [code for language, code in BLOCKS if language == "python"]
    run([sys.executable, "-c", code])


def test_the_python_block_of_the_page_on_clients_runs(server):
    page = (ROOT / "docs" / "clients.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    printed = run([sys.executable, "-c", code.replace("127.0.0.1:8000", server.url[7:])])
    assert "'density'" in printed


def test_the_method_table_is_generated_from_the_registry():
    _, _, rest = README.partition("<!-- methods: `sparseserve methods --markdown` -->\n")
    table, _, _ = rest.partition("<!-- /methods -->")
    generated = run([sys.executable, "-m", "service.cli", "methods", "--markdown"])
    assert table.strip() == generated.strip()


def test_every_file_the_readme_links_exists():
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert len(links) >= 5
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_make_targets_of_the_readme_exist():
    targets = set(re.findall(r"make (\w+)", README))
    makefile = (ROOT / "Makefile").read_text()
    assert {"serve", "test", "bench"} <= targets
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
