"""An engine per test, since each breaks it in a way of its own."""

import pytest

from tests.service.engine.driving import wait_until


@pytest.fixture
def engine(running):
    """A fresh one, of which a fault must leave nothing behind."""
    with running() as one:
        yield one
        wait_until(lambda: one.status().num_pages_used == 0)
        assert one._loop.num_unfinished == 0
