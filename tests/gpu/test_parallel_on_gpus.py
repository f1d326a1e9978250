"""Two GPUs that hold one model together, against one: NCCL within graphs, and running ahead."""

import pytest
import torch

from service.engine.engine import Engine
from service.engine.events import NoEvents
from service.settings import Settings
from tests.gpu.test_engine_on_gpu import IDS, generate, planted_prompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
    pytest.mark.timeout(300),
]


def engine_of(num_ranks: int, *, run_ahead: bool | None = None) -> Engine:
    settings = Settings(
        dtype="float32",
        device="cuda",
        kv_cache_bytes=2**31 // num_ranks,
        max_running_requests=32,
        tensor_parallel=num_ranks,
        run_ahead=run_ahead,
    )
    return Engine.load(settings, NoEvents())


@pytest.fixture(scope="module")
def alone():
    return engine_of(1)


@pytest.fixture(scope="module")
def together():
    engine = engine_of(2)
    yield engine
    engine.stop()


def test_the_ranks_were_compared_with_the_whole_model(together):
    assert together.self_test is not None
    assert together.self_test.error < 1e-3


@pytest.mark.parametrize(("name", "version"), IDS, ids=["@".join(i) for i in IDS])
def test_tokens_and_statistics_are_those_of_one_gpu(name, version, alone, together):
    prompt = planted_prompt(alone, 1500)
    [expected] = generate(alone, [(name, version)], [prompt], 24)
    [given] = generate(together, [(name, version)], [prompt], 24)
    assert given[0] == expected[0]
    for one, other in zip(given[1].layers, expected[1].layers, strict=True):
        assert len(one.heads) == len(other.heads)
        for phase, counts in one.phases.items():
            assert counts.blocks_total == other.phases[phase].blocks_total
            assert counts.kv_bytes_dense == other.phases[phase].kv_bytes_dense
            # Decisions at the very edge may fall the other way where sums are rounded otherwise.
            assert counts.density == pytest.approx(other.phases[phase].density, abs=0.02)


def test_a_mixed_batch_is_replayed_and_gives_each_request_what_it_gets_alone(alone, together):
    prompts = [planted_prompt(alone, 300 + 117 * index) for index in range(len(IDS))]
    expected = generate(alone, IDS, prompts, 20)
    for _ in range(2):  # the second time graphs that were captured are replayed
        given = generate(together, IDS, prompts, 20)
        assert [tokens for tokens, _ in given] == [tokens for tokens, _ in expected]
