"""When the ranks no longer agree, nothing more is served and everything ends."""

import asyncio
import os
import signal
import time

import pytest
import torch

from service.engine.engine import Engine
from service.engine.events import NoEvents
from service.engine.generation import GenerationRequest, build_sequence
from service.engine.parallel import Ranks
from service.engine.sequence import SamplingParams
from service.errors import UnavailableError
from sparse_methods import get_sparse_method
from tests.service.engine.test_parallel import settings_of

pytestmark = pytest.mark.timeout(240)
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture
def engine(tiny_model_dir, _no_last_resort):
    engine = Engine.load(settings_of(tiny_model_dir, 2), NoEvents())
    yield engine
    engine.stop()
    ranks_of(engine).group.leave()
    assert not torch.distributed.is_initialized()


def ranks_of(engine: Engine) -> Ranks:
    assert engine._ranks is not None
    return engine._ranks


def add_request(engine: Engine) -> None:
    dense = get_sparse_method("dense")()
    engine.core.add(build_sequence("x", [5] * 20, dense, GREEDY, 0))


def wait_for_failure(engine: Engine) -> None:
    deadline = time.monotonic() + 30
    while not engine._loop.death:  # which comes after the failure of the ranks
        assert time.monotonic() < deadline
        time.sleep(0.01)


def check_that_nothing_is_served(engine: Engine, reason: str) -> None:
    status = engine.status()
    assert not status.is_alive
    assert status.reason == f"the engine cannot go on: {reason}"
    request = GenerationRequest(
        request_id="y",
        prompt="a",
        prompt_ids=None,
        method=get_sparse_method("dense")(),
        sampling=GREEDY,
    )
    with pytest.raises(UnavailableError, match="No new work is accepted"):
        asyncio.run(engine.submit(request))
    with pytest.raises(UnavailableError):
        engine.core.step()
    assert engine.core.fail_all(UnavailableError("over"), "shutdown")
    assert not engine.core.has_work


def test_a_step_that_fails_on_rank_0_is_the_last(engine, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of memory, say")

    add_request(engine)
    engine.core.step()
    with monkeypatch.context() as broken:
        broken.setattr(engine.runner, "_forward", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.core.step()
    check_that_nothing_is_served(engine, "rank 0 failed in run (RuntimeError)")


def test_a_step_without_the_other_rank_fails(engine):
    add_request(engine)
    engine.core.step()
    os.kill(ranks_of(engine).followers.pids[0], signal.SIGKILL)
    wait_for_failure(engine)
    check_that_nothing_is_served(engine, "tensor-parallel rank 1 ended with status -9")


def test_a_step_that_fails_on_another_rank_ends_it(engine):
    ranks_of(engine).followers.tell(("nonsense",))
    wait_for_failure(engine)
    add_request(engine)
    check_that_nothing_is_served(engine, "tensor-parallel rank 1 ended with status 1")


def test_a_rank_leaves_it_to_rank_0_when_to_end(engine):
    os.kill(ranks_of(engine).followers.pids[0], signal.SIGTERM)
    add_request(engine)
    updates = [update for _ in range(12) for update in engine.core.step().values()]
    assert updates[-1].finish is not None
    assert sum(len(update.token_ids) for update in updates) == GREEDY.max_tokens
    assert not ranks_of(engine).failure
