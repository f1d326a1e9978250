"""Whose time is up ends: with an error if it never ran, with what there is if it did."""

import time

import pytest

from service.engine.deadlines import Deadlines
from service.engine.sequence import FinishReason, Sequence, Update
from service.errors import QueueTimeoutError
from tests.service.engine.stepping import engine_of, sequence_of, tokens_of


def sequence(queue_deadline=1e9, deadline=1e9, started_at=None):
    one = sequence_of([5, 6])
    one.queue_deadline, one.deadline = queue_deadline, deadline
    one.first_scheduled_at = started_at
    return one


def test_a_deadline_in_the_queue_counts_until_the_first_step():
    waiting, started = sequence(queue_deadline=10), sequence(queue_deadline=10, started_at=3)
    late = sequence(deadline=20)
    deadlines, live = Deadlines(), [waiting, started, late]
    for one in live:
        deadlines.watch(one)
    assert deadlines.expired(live, 9.9) == []
    assert deadlines.expired(live, 10) == [waiting]
    live.remove(waiting)
    assert deadlines.expired(live, 19.9) == []
    assert deadlines.expired(live, 20) == [late]
    assert deadlines.expired([started], 30) == []


class Unreadable(list[Sequence]):
    def __iter__(self):
        raise AssertionError("a step must not look at everybody")


def test_before_the_first_deadline_nobody_is_looked_at():
    deadlines = Deadlines()
    deadlines.watch(sequence(deadline=20))
    assert deadlines.expired(Unreadable(), 19) == []
    assert Deadlines().expired(Unreadable(), 1e12) == []


@pytest.fixture(params=[False, True], ids=["waits", "runs-ahead"])
def engine(request, tiny_model_dir):
    return engine_of(tiny_model_dir, num_pages=40, run_ahead=request.param)


@pytest.fixture
def reasons(engine, monkeypatch):
    """Why generations were aborted."""
    heard: list[str] = []
    monkeypatch.setattr(engine.events, "aborted", heard.append)
    return heard


def test_an_overdue_generation_ends_with_what_it_has(engine, reasons):
    core, one = engine.core, sequence_of(tokens_of(1, 20), max_tokens=300, stop=("never said",))
    other = sequence_of(tokens_of(1, 20), max_tokens=12)
    core.add(one)
    core.add(other)
    all_got = {one: Update(), other: Update()}

    def step():
        for sequence, update in core.step().items():
            all_got[sequence] += update

    for _ in range(5):
        step()
    one.deadline = time.monotonic()
    core._deadlines.watch(one)
    while core.has_work:
        step()
    got, rest = all_got.values()
    assert got.finish is not None
    assert got.finish.reason is FinishReason.ABORT
    assert 0 < len(got.token_ids) == got.finish.num_generated_tokens < 300
    assert got.text == engine.tokenizer.decode(list(got.token_ids)), "nothing is held back"
    assert rest.finish is not None
    assert len(rest.token_ids) == 12
    assert reasons == ["deadline"]
    assert core.num_pages_used == core.num_running == 0


def test_an_overdue_request_in_the_queue_gets_an_error(engine, reasons):
    core = engine.core
    running = [sequence_of(tokens_of(i, 20), max_tokens=12) for i in range(6)]
    waiting = sequence_of(tokens_of(9, 20))
    waiting.queue_deadline = time.monotonic() + 1e-3
    for one in (*running, waiting):
        core.add(one)
    updates = core.step()  # which a busy machine may begin after the deadline
    time.sleep(2e-3)
    update = (updates | core.step())[waiting]
    assert isinstance(update.error, QueueTimeoutError)
    assert update.finish is None
    assert core.num_waiting == core.num_waiting_tokens == 0
    while core.has_work:
        assert waiting not in core.step()
    assert reasons == ["deadline"]
    assert core.num_pages_used == 0
