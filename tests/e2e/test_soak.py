"""A minute of mixed load on a real server, as ``python -m benchmarks.server measure --soak 1``."""

import pytest

from benchmarks.soak import soak


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_a_minute_of_mixed_load_loses_doubles_and_leaks_nothing():
    outcomes = soak(60)
    for kind in ("answered", "left", "cancelled", "refused", "answers with cached tokens"):
        assert outcomes[kind] > 0, outcomes
    assert outcomes["RSS growth"] < 0.02, outcomes
