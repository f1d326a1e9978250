"""Two ranks give everybody the tokens and the statistics that one process gives."""

import asyncio
from typing import ClassVar

import pytest
import torch

from service.engine.engine import Engine
from service.engine.generation import GenerationRequest
from service.engine.parallel import starting_ranks
from service.engine.prefix import PrefixKeys
from service.engine.sequence import SamplingParams
from service.errors import BadRequestError, ModelNotSupportedError
from service.settings import Settings
from sparse_methods import Phase, get_sparse_method
from sparse_methods.calibration.artifact import Fit, MethodCalibration, PhaseCalibration
from sparse_methods.methods.block_topk_v1 import BlockTopK
from sparse_methods.methods.hybrid_v1 import Hybrid
from tests.service.engine.stepping import (
    BLOCK,
    IDS,
    NUM_PAGES,
    PAGE_BYTES,
    Counting,
    Request,
    assert_alike,
    play,
    requests_of,
)

pytestmark = pytest.mark.timeout(240)  # processes that import torch, on two slow cores


def settings_of(directory, num_ranks: int, **others: object) -> Settings:
    values = {
        "model": directory,
        "device": "cpu",
        "method": "dense",
        "block_size": BLOCK,
        "kv_cache_bytes": NUM_PAGES * PAGE_BYTES // num_ranks,
        "max_step_tokens": 256,
        "max_running_requests": 6,
        "tensor_parallel": num_ranks,
    }
    return Settings.model_validate({**values, **others})


@pytest.fixture(scope="module", params=[False, True], ids=["waits", "runs ahead"])
def engines(request, tiny_model_dir, _no_last_resort):
    """One process, and two ranks."""
    settings = [settings_of(tiny_model_dir, n, run_ahead=request.param) for n in (1, 2)]
    loaded = [Engine.load(of_one, Counting()) for of_one in settings]
    yield loaded
    for engine in loaded:
        engine.stop()


def play_both(engines: list[Engine], requests: list[Request]):
    return zip(*(play(engine.core, requests) for engine in engines), strict=True)


def test_the_ranks_were_compared_with_the_whole_model(engines):
    one, two = engines
    assert two.self_test.error < 1e-5
    assert two.self_test.prompt_lens == (13, 29, 40)
    assert two.status().num_pages_total == one.status().num_pages_total == NUM_PAGES
    assert [g.num_kv_heads for g in two.runner.geometries] == [1, 1]


@pytest.mark.parametrize("method_id", IDS)
def test_every_method_reads_and_says_the_same(engines, method_id):
    greedy = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    prompts = [[7 + i * (3 + j) for i in range(n)] for j, n in enumerate((160, 17, 70))]
    requests = [Request(prompt, method_id, greedy) for prompt in prompts]
    for (_, expected), (_, given) in play_both(engines, requests):
        assert_alike(given, expected)
        assert len(given.finish.statistics.layers[0].heads) == 4
        decode = given.finish.statistics.phase(Phase.DECODE)
        assert decode.kv_bytes_dense > 0
        assert given.finish.statistics.overall.blocks_total > 0


@pytest.mark.parametrize("seed", range(6))
def test_random_requests_of_all_methods_together_do_too(engines, seed):
    for (_, expected), (_, given) in play_both(engines, requests_of(seed)):
        assert_alike(given, expected)


def test_those_requests_ran_out_of_pages(engines):
    """What the test above relies on."""
    engines[1].events.num_preempted = 0
    play(engines[1].core, [request for seed in range(6) for request in requests_of(seed)])
    assert engines[1].events.num_preempted > 0


def test_pages_that_prompts_share_are_shared_on_all_ranks(engines):
    prompt = [(5 + 13 * i) % 4000 + 8 for i in range(70)]
    greedy = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)

    class Sharing(Request):
        def sequence(self, index):
            sequence = super().sequence(index)
            sequence.prefix = PrefixKeys(self.prompt_ids, BLOCK, sequence.method)
            return sequence

    for num_cached in (0, 4 * BLOCK):
        requests: list[Request] = [Sharing(prompt, "block_topk@v1", greedy)]
        [((_, expected), (_, given))] = play_both(engines, requests)
        assert_alike(given, expected)
        assert given.finish.num_cached_tokens == num_cached


def test_an_abort_reads_the_counters_of_all_ranks(engines):
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    requests = [
        Request([7 + index] * (20 + 20 * index), "streaming@v1", greedy, aborted_at=5)
        for index in range(2)
    ]
    finished: list[list[object]] = []
    for engine in engines:
        finishes: list[object] = []
        engine.events.finished = lambda _, finish, into=finishes: into.append(finish.statistics)
        play(engine.core, [*requests, Request([9] * 30, "dense@v1", greedy)])
        del engine.events.finished
        finished.append(finishes)
    assert finished[0] == finished[1]


def test_thresholds_that_follow_a_target_follow_that_of_all_heads(engines):
    """Each layer's threshold depends on what all heads skipped in the layers before."""
    fit = Fit(a=1e-9, b=30.0, p=0.3, r_squared=1, min_sparsity=0, max_sparsity=1, num_points=3)
    phases = {phase: PhaseCalibration(layers=(fit, fit)) for phase in Phase}
    calibration = MethodCalibration(
        method="flash_skip_softmax", version="v2", block_size=BLOCK, phases=phases
    )
    knobs = {"target_sparsity": 0.3, "decode_target_sparsity": 0.3}
    method = get_sparse_method("flash_skip_softmax", "v2")(knobs).with_calibration(calibration)
    greedy = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)

    class Calibrated(Request):
        def sequence(self, index):
            sequence = super().sequence(index)
            sequence.method = method
            return sequence

    requests: list[Request] = [
        Calibrated([(7 + 11 * i * i) % 4000 + 8 for i in range(n)], "dense@v1", greedy)
        for n in (160, 60)
    ]
    for (_, expected), (_, given) in play_both(engines, requests):
        assert_alike(given, expected)
        layers = given.finish.statistics.layers
        assert all(layer.phases[Phase.DECODE].blocks_skipped for layer in layers)


def test_prompt_logprobs_are_the_same(engines):
    sampling = SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=2, logprobs=2)
    for (_, expected), (_, given) in play_both(
        engines, [Request(list(range(9, 60)), "dense@v1", sampling)]
    ):
        assert_alike(given, expected)
        assert len(given.prompt_logprobs) == 50
        for one, other in zip(given.prompt_logprobs, expected.prompt_logprobs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


class MixedHeads(BlockTopK):
    """A method that looks at all heads."""

    tensor_parallel_safe: ClassVar[bool] = False


def test_a_method_that_needs_all_heads_is_refused_with_the_names_of_those_that_do_not(engines):
    request = GenerationRequest(
        request_id="x",
        prompt="a",
        prompt_ids=None,
        method=MixedHeads(),
        sampling=SamplingParams(max_tokens=1),
    )
    with pytest.raises(BadRequestError, match=r"divides them among ranks.*'dense'") as refused:
        asyncio.run(engines[1].submit(request))
    assert refused.value.param == "method"


def test_a_hybrid_needs_all_heads_if_a_half_does():
    hybrid = Hybrid()
    assert hybrid.splits_over_ranks()
    hybrid.halves[Phase.PREFILL] = MixedHeads()
    assert not hybrid.splits_over_ranks()


def test_fewer_gpus_than_ranks_are_refused_with_the_numbers(tiny_model_dir, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with (
        pytest.raises(ModelNotSupportedError, match="2 ranks were asked for, but torch sees 1 GPU"),
        starting_ranks(Settings(tensor_parallel=2, device="auto")),
    ):
        pass
