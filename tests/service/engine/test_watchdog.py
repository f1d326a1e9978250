"""Only what was seen to stand still counts."""

import pytest

from service.engine.watchdog import Watchdog


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 1000.0

    monkeypatch.setattr("service.engine.watchdog.time.monotonic", lambda: Clock.now)
    return Clock


def looks(watchdog, clock, seconds, idle_s):
    """Look ten times a second; what came of it."""
    bites = []
    for _ in range(int(seconds * 10)):
        clock.now += 0.1
        bites.append(watchdog.bites(idle_s))
    return bites


def test_an_engine_that_stands_still_while_it_is_watched_is_bitten(clock):
    watchdog = Watchdog(20.0)
    assert not any(looks(watchdog, clock, 60, idle_s=19.0))
    assert watchdog.bites(21.0)


def test_what_stood_still_before_anybody_looked_does_not_count(clock):
    bites = looks(Watchdog(20.0), clock, 30, idle_s=500.0)
    assert not any(bites[:200])
    assert all(bites[202:])


def test_a_process_that_was_stopped_gets_its_time_again(clock):
    watchdog = Watchdog(20.0)
    looks(watchdog, clock, 30, idle_s=0.1)
    clock.now += 3600
    bites = looks(watchdog, clock, 30, idle_s=3600.0)
    assert not any(bites[:200])
    assert all(bites[202:])
