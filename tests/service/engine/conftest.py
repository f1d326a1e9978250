"""Engines on the tiny model, each such that waits for every step and such that runs ahead."""

import faulthandler
import functools

import pytest

from tests.service.engine.driving import running_engine


@pytest.fixture(scope="module")
def _no_last_resort():
    """A rank that is lost ends the process of rank 0, which here is that of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faulthandler, "dump_traceback_later", lambda *_, **__: None)
        yield


@pytest.fixture(scope="module", params=[False, True], ids=["waits", "runs-ahead"])
def run_ahead(request):
    """Every test holds for an engine that waits for each step, and for one that does not."""
    return request.param


@pytest.fixture(scope="module")
def running(tiny_model_dir, run_ahead):
    """What starts an engine with the settings given, and stops it at the end of the block."""
    return functools.partial(running_engine, tiny_model_dir, run_ahead=run_ahead)


@pytest.fixture(scope="module")
def engine(running):
    with running() as one:
        yield one
