"""Reusing the beginning of a prompt changes no token and no decision, whatever the method."""

import random
import time
from typing import Any

import pytest
import torch

from service.engine.engine import Engine
from service.engine.kv_cache import PageAllocator
from service.engine.model_runner import ModelRunner
from service.engine.scheduler import Chunk
from service.engine.sequence import FinishReason, Sequence, Update
from service.errors import GenerationError
from service.models.loading import load_model
from sparse_methods import Phase, get_sparse_method
from sparse_methods.calibration.artifact import Fit, MethodCalibration, PhaseCalibration
from sparse_methods.method import SparseAttentionMethod
from sparse_methods.statistics import RequestStatistics
from tests.service.engine.stepping import BLOCK, IDS, engine_of, method_of, sequence_of, tokens_of

NUM_GENERATED = 20
SHARED = 7 * BLOCK + 5
HIT = 7 * BLOCK


class Playground:
    """A runner and its pages, on which prompts are computed and given tokens are decoded."""

    def __init__(self, directory) -> None:
        loaded = load_model(directory, "cpu", "float32")
        layers = [(layer.module, layer.geometry) for layer in loaded.layers]
        self.runner = ModelRunner(loaded.model, layers, num_pages=60, block_size=BLOCK, num_slots=1)
        self.pages = PageAllocator(60, BLOCK)

    def play(self, one: Sequence, first_chunk: int = 4096):
        """Statistics after the first chunk and at the end, and the logits of every next token."""
        one.slot = 0
        self.pages.reuse(one)
        logits, early = [], RequestStatistics()
        for num_given in range(NUM_GENERATED + 1):
            one.output_ids = tokens_of(1, num_given)
            while one.num_uncomputed_tokens:
                num_tokens = min(one.num_uncomputed_tokens, first_chunk)
                chunk = Chunk(one, one.num_computed_tokens, num_tokens)
                assert self.pages.try_reserve(one, num_tokens)
                rows, completed = self.runner.run([chunk])
                logits += [row.clone() for row, _ in zip(rows, completed, strict=False)]
                one.num_computed_tokens = chunk.stop
                self.pages.publish(one, chunk.start, chunk.stop)
                if chunk.is_first:
                    early = self.runner.statistics(one)
                first_chunk = 4096
        statistics = self.runner.statistics(one)
        self.pages.release(one)
        return early, statistics, torch.stack(logits)


CASES: list[tuple[str, SparseAttentionMethod, int]] = [
    *((method_id, method_of(method_id), HIT) for method_id in IDS),
    (
        "snapkv, wide window",
        get_sparse_method("snapkv")({"dense_below": 0, "budget_pages": 2, "window": 3 * BLOCK}),
        6 * BLOCK,  # of a prompt of 9 blocks and a bit, the rows of the last 3 rank the pages
    ),
    (
        "hybrid with snapkv",
        get_sparse_method("hybrid")(
            {
                "prefill": "streaming",
                "prefill_params": {"window_blocks": 2, "dense_below": 0},
                "decode": "snapkv",
                "decode_params": {"budget_pages": 1, "window": 3 * BLOCK, "dense_below": 0},
            }
        ),
        6 * BLOCK,
    ),
]


@pytest.mark.parametrize(
    ("method", "expected_hit"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_a_reused_prefix_changes_no_decision_of_any_method(tiny_model_dir, method, expected_hit):
    playground = Playground(tiny_model_dir)
    shared = tokens_of(2, SHARED)
    before = sequence_of(shared + tokens_of(3, 5 * BLOCK), method)
    prompt = shared + tokens_of(4, 2 * BLOCK)
    plain = sequence_of(prompt, method, salt="never found")
    early, expected, expected_logits = playground.play(plain, first_chunk=expected_hit)
    playground.play(before)
    hit = sequence_of(prompt, method)
    _, given, logits = playground.play(hit)
    assert (plain.num_cached_tokens, hit.num_cached_tokens) == (0, expected_hit)
    assert early + given == expected
    assert early.phase(Phase.DECODE) == type(early.phase(Phase.DECODE))()
    assert torch.allclose(logits, expected_logits, atol=1e-3)
    if Phase.DECODE in method.phases and "threshold" not in str(method.get_threshold_info()):
        assert expected.phase(Phase.DECODE).density < 1 or "predictive" in method.name


@pytest.fixture(scope="module", params=[False, True], ids=["waits", "runs-ahead"])
def engine(request, tiny_model_dir):
    return engine_of(tiny_model_dir, num_pages=60, run_ahead=request.param)


def play(engine: Engine, *sequences: Sequence) -> list[Update]:
    core = engine.core
    got = dict.fromkeys(sequences, Update())
    for one in sequences:
        core.add(one)
    while core.has_work:
        for one, update in core.step().items():
            got[one] += update
    assert core.num_pages_used == core.num_running == core.num_waiting == 0
    return list(got.values())


def finish_of(update: Update) -> Any:
    assert update.finish is not None
    return update.finish


def test_what_was_reused_is_told_and_counts_nowhere(engine):
    prompt = tokens_of(10, 10 * BLOCK)
    first, second = (finish_of(play(engine, sequence_of(prompt))[0]) for _ in range(2))
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 9 * BLOCK)
    prefill = [one.statistics.phase(Phase.PREFILL).blocks_total for one in (first, second)]
    assert prefill == [2 * 4 * 55, 2 * 4 * 10]  # layers, heads, and pairs of tile and block
    assert first.statistics.phase(Phase.DECODE) == second.statistics.phase(Phase.DECODE)


@pytest.mark.parametrize("other", [{"method": "streaming@v1"}, {"salt": "mine"}])
def test_methods_and_salts_share_nothing(engine, other):
    prompt = tokens_of(11, 5 * BLOCK)
    play(engine, sequence_of(prompt))
    finish = finish_of(play(engine, sequence_of(prompt, **other))[0])
    assert finish.num_cached_tokens == 0


def test_requests_that_come_together_compute_their_common_beginning_once(engine):
    prompt = tokens_of(12, 5 * BLOCK + 3)
    alone = [
        play(engine, sequence_of(prompt, salt=str(i), index=i, temperature=1.0, seed=5))[0]
        for i in range(4)
    ]
    together = play(
        engine, *(sequence_of(prompt, index=i, temperature=1.0, seed=5) for i in range(4))
    )
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    assert len({one.token_ids for one in together}) > 1
    cached = [finish_of(one).num_cached_tokens for one in together]
    assert cached == [0, 5 * BLOCK, 5 * BLOCK, 5 * BLOCK]


def test_who_waits_for_a_page_goes_on_alone_when_its_owner_leaves(engine):
    prompt = tokens_of(13, 30 * BLOCK)
    first, second = sequence_of(prompt), sequence_of(prompt)
    core = engine.core
    core.add(first)
    core.add(second)
    core.step()
    core.step()
    assert first.num_own_tokens == first.num_prompt_tokens
    assert second.num_own_tokens == 0
    while core.has_work:
        core.step()
    first, second = (sequence_of(tokens_of(16, 30 * BLOCK)) for _ in range(2))
    core.add(first)
    core.add(second)
    core.step()
    assert (first.num_own_tokens > 0, second.num_own_tokens) == (True, 0)
    core.abort(first, "client")
    got = Update()
    while core.has_work:
        got += core.step().get(second, Update())
    assert finish_of(got).reason is FinishReason.LENGTH
    assert finish_of(got).num_cached_tokens < 30 * BLOCK - BLOCK


def test_whoever_waits_for_a_page_of_another_counts_as_waiting_and_has_read_nothing(engine):
    core, prompt = engine.core, tokens_of(17, 25 * BLOCK)
    play(engine, *(sequence_of(tokens_of(30 + i, 20)) for i in range(6)))  # use every place
    first, second = sequence_of(prompt), sequence_of(prompt)
    core.add(first)
    core.add(second)
    core.step()
    assert (core.num_running, core.num_waiting, second.slot is None) == (1, 1, False)
    assert core.num_waiting_tokens == 25 * BLOCK
    finishes = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.events, "finished", lambda _, finish: finishes.append(finish))
        core.abort(second, "client")
    assert finishes[0].statistics == RequestStatistics()
    core.abort(first, "client")
    while core.has_work:
        core.step()


@pytest.mark.parametrize("run_ahead", [False, True])
def test_whoever_waits_for_a_page_of_another_does_not_wait_for_its_turn(
    tiny_model_dir, run_ahead, monkeypatch
):
    """Or a second choice would be refused wherever a prompt takes longer than the queue may."""
    core = engine_of(tiny_model_dir, num_pages=60, run_ahead=run_ahead).core
    prompt = tokens_of(18, 25 * BLOCK)
    sequences = [sequence_of(prompt), sequence_of(prompt)]
    for one in sequences:
        one.queue_deadline = one.arrived_at + 1000
        core.add(one)
    got, now = dict.fromkeys(sequences, Update()), time.monotonic
    core.step()
    core.step()
    monkeypatch.setattr(time, "monotonic", lambda: now() + 2000)
    while core.has_work:
        for one, update in core.step().items():
            got[one] += update
    assert [finish_of(update).num_cached_tokens for update in got.values()] == [0, 24 * BLOCK]


def test_a_target_is_reused_among_prompts_of_one_length(tiny_model_dir):
    fit = Fit(
        a=100.0, b=8.0, p=0.5, r_squared=1.0, min_sparsity=0.1, max_sparsity=0.9, num_points=3
    )
    calibration = MethodCalibration(
        method="flash_skip_softmax",
        version="v2",
        block_size=BLOCK,
        phases={Phase.PREFILL: PhaseCalibration(layers=(fit, fit))},
    )
    knobs = {"target_sparsity": 0.5, "dense_below": 0}
    method = get_sparse_method("flash_skip_softmax")(knobs).with_calibration(calibration)
    playground, shared = Playground(tiny_model_dir), tokens_of(2, SHARED)
    prompt = shared + tokens_of(4, 2 * BLOCK)
    plain = sequence_of(prompt, method, salt="never found")
    early, expected, expected_logits = playground.play(plain, first_chunk=HIT)
    longer, equal = (shared + tokens_of(3, n * BLOCK) for n in (5, 2))
    playground.play(sequence_of(longer, method))
    playground.play(other := sequence_of(equal, method))
    assert other.num_cached_tokens == 0
    playground.play(hit := sequence_of(prompt, method))
    assert hit.num_cached_tokens == HIT
    again = sequence_of(prompt, method)
    again.most_cached_tokens = HIT
    _, given, logits = playground.play(again)
    assert early + given == expected
    assert 0 < expected.phase(Phase.PREFILL).density < 1
    assert torch.allclose(logits, expected_logits, atol=1e-3)


def test_nothing_of_a_failed_request_is_reused(engine, monkeypatch):
    prompt = tokens_of(14, 5 * BLOCK)
    original = engine.runner.run

    def poison(chunks):
        logits, completed = original(chunks)
        return logits * float("nan"), completed

    monkeypatch.setattr(engine.runner, "run", poison)
    assert isinstance(play(engine, sequence_of(prompt))[0].error, GenerationError)
    monkeypatch.undo()
    finish = finish_of(play(engine, sequence_of(prompt))[0])
    assert finish.num_cached_tokens == 0


def test_a_step_that_raises_leaves_nothing_to_be_found(engine, monkeypatch):
    prompt = tokens_of(15, 5 * BLOCK)

    def fail(chunks):
        raise RuntimeError("out of luck")

    core, failed = engine.core, sequence_of(prompt)
    monkeypatch.setattr(engine.runner, "run", fail)
    core.add(failed)
    with pytest.raises(RuntimeError, match="luck"):
        core.step()
    core.fail_step(GenerationError("failed"))
    monkeypatch.undo()
    assert finish_of(play(engine, sequence_of(prompt))[0]).num_cached_tokens == 0


@pytest.mark.parametrize("seed", range(8))
def test_crowded_requests_with_common_beginnings_get_what_they_get_alone(tiny_model_dir, seed):
    """On too few pages, so that they are evicted, and sequences give way and start over."""
    rng = random.Random(seed)
    stems = [tokens_of(20 + i, 6 * BLOCK) for i in range(2)]
    jobs = [
        (
            rng.choice(stems)[: rng.choice([2, 5, 6]) * BLOCK] + tokens_of(i, rng.randrange(1, 40)),
            rng.choice(IDS[:6] if i % 2 else ["dense@v1", "snapkv@v1"]),
            {
                "max_tokens": rng.choice([3, 30, 60]),
                "temperature": rng.choice([0.0, 1.0]),
                "seed": i,
            },
        )
        for i in range(14)
    ]
    roomy = engine_of(tiny_model_dir, num_pages=100, run_ahead=False)
    tight = engine_of(tiny_model_dir, num_pages=13, run_ahead=seed % 2 == 1)
    alone = []
    for index, (prompt, method, sampling) in enumerate(jobs):
        one = sequence_of(prompt, method, index=index, **sampling)
        one.prefix = None
        alone += play(roomy, one)
    sequences = [
        sequence_of(prompt, method, index=index, **sampling)
        for index, (prompt, method, sampling) in enumerate(jobs)
    ]
    for given, expected, one in zip(play(tight, *sequences), alone, sequences, strict=True):
        finish, plain = finish_of(given), finish_of(expected)
        assert given.token_ids == expected.token_ids
        assert given.text == expected.text
        decode, whole = finish.statistics.phase(Phase.DECODE), plain.statistics.phase(Phase.DECODE)
        assert decode == whole
        num_blocks = -(-one.num_prompt_tokens // BLOCK)
        cached = finish.num_cached_tokens // BLOCK
        pairs = (num_blocks * (num_blocks + 1) - cached * (cached + 1)) // 2
        assert finish.statistics.phase(Phase.PREFILL).blocks_total == 2 * 4 * pairs
    assert any(one.num_cached_tokens for one in sequences)
    TIGHT["preempted"] += sum(one.num_preemptions for one in sequences)


TIGHT = {"preempted": 0}


def test_the_crowd_above_did_give_way():
    assert TIGHT["preempted"] > 0
