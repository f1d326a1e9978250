"""Processes at the end of a pipe: told, asked, ended, and missed when they die."""

import faulthandler
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from service.errors import UnavailableError
from service.parallel import followers as module
from service.parallel.followers import Followers

ECHO = "tests.service.parallel.echo"


@pytest.fixture
def last_resort(monkeypatch):
    """What would end this process."""
    armed: list[tuple[object, ...]] = []
    monkeypatch.setattr(
        faulthandler, "dump_traceback_later", lambda *args, **kwargs: armed.append(args)
    )
    return armed


@pytest.fixture
def pair():
    ranks = Followers(ECHO, 3)
    yield ranks
    ranks.stop()


def wait_for(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_everybody_answers_in_the_order_of_ranks(pair):
    pair.tell("first")
    assert pair.ask("second") == [(1, ["first", "second"]), (2, ["first", "second"])]
    assert not pair.failure


def test_stopping_ends_all_of_them_and_is_no_failure(last_resort):
    ranks = Followers(ECHO, 3)
    ranks.ask("hello")
    pids = ranks.pids
    ranks.stop()
    assert not any(map(is_running, pids))
    assert not ranks.failure
    assert not last_resort


def test_a_signal_that_comes_before_a_follower_can_heed_it_ends_nobody():
    ranks = Followers(ECHO, 2)
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    os.kill(ranks.pids[0], signal.SIGTERM)
    assert ranks.ask("hello") == [(1, ["hello"])]
    ranks.stop()
    assert not ranks.failure


def test_one_that_does_not_end_is_killed(monkeypatch):
    monkeypatch.setattr(module, "_STOP_TIMEOUT_S", 0.2)
    ranks = Followers(ECHO, 2)
    ranks.ask("hello")
    ranks.tell("sleep")
    ranks.stop()
    assert not any(map(is_running, ranks.pids))


def test_the_death_of_one_is_a_failure_at_once(pair, last_resort):
    pair.ask("hello")
    os.kill(pair.pids[1], signal.SIGKILL)
    wait_for(lambda: pair.failure)
    assert pair.failure == "tensor-parallel rank 2 ended with status -9"
    assert len(last_resort) == 1  # whatever hangs, the process ends
    with pytest.raises(UnavailableError, match="rank 2 ended"):
        pair.tell("anything")


def test_who_reads_of_a_failure_relies_on_the_end_being_near(pair, monkeypatch):
    failures_when_armed: list[str] = []
    monkeypatch.setattr(
        faulthandler,
        "dump_traceback_later",
        lambda *_, **__: failures_when_armed.append(pair.failure),
    )
    pair.fail("first")
    assert failures_when_armed == [""]


def test_two_that_see_a_failure_together_are_one(pair, monkeypatch):
    armed: list[float] = []
    told: list[str] = []

    def arm(grace_s: float, **_: object) -> None:
        armed.append(grace_s)
        time.sleep(0.1)  # meanwhile the other one comes

    monkeypatch.setattr(faulthandler, "dump_traceback_later", arm)
    pair.on_failure(told.append)
    reasons = ["a rank's thread", "who waits for its answer"]
    threads = [threading.Thread(target=pair.fail, args=(reason,)) for reason in reasons]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(armed) == 1
    assert told == [pair.failure]
    assert pair.failure in reasons


def test_one_that_dies_before_it_answers_is_not_waited_for(pair, last_resort):
    with pytest.raises(UnavailableError, match="tensor-parallel rank"):
        pair.ask("die")
    assert pair.failure


def test_a_message_that_cannot_be_read_ends_who_gets_it(pair, last_resort):
    pair.ask("hello")
    pair._pipes[0].send_bytes(b"no pickle")
    wait_for(lambda: pair.failure)
    assert pair.failure == "tensor-parallel rank 1 ended with status 1"


def test_one_that_does_not_answer_is_not_waited_for_long(pair, last_resort, monkeypatch):
    monkeypatch.setattr(module, "ANSWER_TIMEOUT_S", 0.1)
    monkeypatch.setattr(module, "_STOP_TIMEOUT_S", 0.1)
    with pytest.raises(UnavailableError, match="rank 1 does not answer"):
        pair.ask("sleep")


def test_a_process_that_hangs_after_a_death_ends_all_the_same():
    code = (
        "import os, time; from service.parallel import followers;"
        f"followers._END_GRACE_S = 0.5; ranks = followers.Followers({ECHO!r}, 2);"
        "ranks.ask('hello'); os.kill(ranks.pids[0], 9); time.sleep(60)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=50
    )
    assert done.returncode == 1
    assert "Timeout" in done.stderr  # with what every thread waited for


def test_when_rank_0_dies_the_others_end():
    code = (
        "import time; from service.parallel.followers import Followers;"
        f"ranks = Followers({ECHO!r}, 3); ranks.ask('hello'); print(*ranks.pids, flush=True);"
        "ranks.tell('sleep'); time.sleep(60)"
    )
    leader = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert leader.stdout is not None
    with leader.stdout:
        pids = [int(pid) for pid in leader.stdout.readline().split()]
        assert all(map(is_running, pids))
        leader.kill()
        leader.wait()
    wait_for(lambda: not any(map(is_running, pids)))
