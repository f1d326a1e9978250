"""The door of the queue: what it lets in, and when it tells others to come back."""

from types import SimpleNamespace
from typing import Any

import pytest

from service.engine.admission import Admission
from service.errors import QueueFullError
from service.settings import Settings


def door(speed=0.0, num_unfinished=0, num_waiting=0, **settings):
    limits = {"max_waiting_requests": 3, "max_running_requests": 2, **settings}
    core: Any = SimpleNamespace(prompt_tokens_per_s=speed)
    loop: Any = SimpleNamespace(num_unfinished=num_unfinished, num_waiting_tokens=num_waiting)
    return Admission(Settings(**limits), 1000, core, loop)


def test_generations_are_counted_all_choices_of_a_request_together():
    door(num_unfinished=3).check(2, 0)
    with pytest.raises(QueueFullError, match=r"4 generations .* 5 at most"):
        door(num_unfinished=4).check(2, 0)


@pytest.mark.parametrize(("limit", "allowed"), [(500, 500), (None, 4000)])
def test_tokens_are_counted_unless_nobody_waits(limit, allowed):
    settings = {"max_waiting_tokens": limit}
    door(num_waiting=100, **settings).check(1, allowed - 100)
    door(num_waiting=0, **settings).check(1, allowed * 2)
    with pytest.raises(QueueFullError, match=f"holds {allowed}"):
        door(num_waiting=100, **settings).check(1, allowed - 99)


@pytest.mark.parametrize(
    ("speed", "num_waiting", "expected"), [(0.0, 900, 1), (100.0, 950, 10), (1.0, 10**6, 120)]
)
def test_when_to_come_back_follows_the_queue_and_the_speed(speed, num_waiting, expected):
    with pytest.raises(QueueFullError) as caught:
        door(speed, num_unfinished=5, num_waiting=num_waiting).check(1, 0)
    assert caught.value.retry_after_s == expected
