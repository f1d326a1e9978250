"""Tests that need a program which is no Python package; they bring it along."""

import pytest

from tests.e2e.conftest import Server
from tests.ops.debian import program


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent.name == "ops":
            item.add_marker(pytest.mark.ops)


@pytest.fixture(scope="session")
def promtool():
    return program("promtool", "prometheus")


@pytest.fixture(scope="session")
def prometheus():
    return program("prometheus", "prometheus")


@pytest.fixture(scope="session")
def ops_server():
    running = Server("--vllm-metric-aliases").wait_ready()
    yield running
    running.stop()
