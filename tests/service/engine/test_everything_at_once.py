"""Reused pages, too few of them, priorities, grammars, reports, leaving clients and faults at once.

Whoever is not told that something failed gets what it would get alone; nothing is left behind.
"""

import asyncio
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from service.engine.core import EngineCore
from service.engine.engine import Engine
from service.engine.grammar import Grammar, GrammarCompiler, Matcher
from service.engine.prefix import PrefixKeys
from service.engine.sequence import Finish, Sequence, Update
from sparse_methods import Phase
from tests.service.engine.stepping import BLOCK, IDS, engine_of, method_of, sequence_of, tokens_of

STEMS = [tokens_of(20 + index, 6 * BLOCK) for index in range(2)]
METHODS = [
    "dense@v1",
    "quest@v1",
    "snapkv@v1",
    *IDS,
]  # some of them often, so that pages are reused
COUNTED = {"failed": 0, "preempted": 0, "cached": 0, "compared": 0}


@dataclass
class Job:
    """A request, when it comes, and when its client leaves, if it does."""

    index: int
    prompt_ids: list[int]
    method_id: str
    sampling: dict[str, Any]
    matcher: Matcher | None
    priority: int
    arrives_at: int
    leaves_at: int
    is_cancelled: bool

    def sequence(self) -> Sequence:
        one = sequence_of(self.prompt_ids, self.method_id, index=self.index, **self.sampling)
        may_reuse = self.sampling["prompt_logprobs"] is None  # as ``build_sequences`` has it
        one.prefix = PrefixKeys(
            self.prompt_ids, BLOCK, method_of(self.method_id), may_reuse=may_reuse
        )
        one.matcher = None if self.matcher is None else self.matcher.fork()
        one.priority = self.priority
        return one


def jobs_of(rng: random.Random, matcher: Matcher) -> list[Job]:
    return [job_of(index, rng, rng.choice([None, None, None, matcher])) for index in range(14)]


def job_of(index: int, rng: random.Random, matcher: Matcher | None) -> Job:
    stem = rng.choice(STEMS)[: rng.choice([0, 2, 5, 6]) * BLOCK]
    arrives_at = rng.choice([0, 0, rng.randrange(30)])
    return Job(
        index,
        stem + tokens_of(index, rng.randrange(1, 40)),
        rng.choice(METHODS),
        {
            "max_tokens": 60 if matcher else rng.choice([1, 3, 30, 60]),
            "ignore_eos": matcher is None,
            "temperature": rng.choice([0.0, 1.0]),
            "seed": index,
            "presence_penalty": rng.choice([0.0, 0.0, 1.0]),
            "logprobs": rng.choice([None, 2]),
            "prompt_logprobs": rng.choice([None, None, None, 2]),
        },
        matcher,
        priority=rng.choice([0, 0, 0, 1]),
        arrives_at=arrives_at,
        leaves_at=rng.choice([-1, -1, -1, arrives_at + rng.randrange(1, 20)]),
        is_cancelled=rng.random() < 0.5,
    )


class Faults:
    """Puts faults into an engine: each of its parts fails now and then."""

    def __init__(self, engine: Engine, rng: random.Random, monkeypatch) -> None:
        self._rng, self._patch = rng, monkeypatch
        self._spare_steps = 0
        core, out_of_memory = engine.core, torch.OutOfMemoryError("full")
        self._break(engine.runner.attention, "implementation", 0.02, out_of_memory)
        self._break(core._sampler, "sample", 0.01, RuntimeError("out of luck"))
        self._break(core._sampler, "report_prompts", 0.01, RuntimeError("out of luck"))
        self._break(core, "_append", 0.002, RuntimeError("out of luck"))
        self._core = core

    def _break(self, target: Any, name: str, share: float, error: Exception) -> None:
        original = getattr(target, name)

        def broken(*args):
            if self._rng.random() < share:
                raise error
            return original(*args)

        self._patch.setattr(target, name, broken)

    def strike(self) -> None:
        """Let what is under way fail when it is collected, now and then."""
        launched: Any = self._core._launched
        if launched is not None and self._rng.random() < 0.01:
            launched.sampled.result = self._fail

    def _fail(self):
        raise RuntimeError("out of luck")


def play(core: EngineCore, jobs: list[Job], faults: Faults | None = None) -> list[Update]:
    """What each job got."""
    sequences = [job.sequence() for job in jobs]
    got, ended = dict.fromkeys(sequences, Update()), set()
    for step in range(5000):
        updates: dict[Sequence, Update] = {}
        for one, job in zip(sequences, jobs, strict=True):
            if job.arrives_at == step:
                core.add(one)
            elif job.leaves_at == step and job.is_cancelled:
                updates |= core.cancel(one)
            elif job.leaves_at == step:
                core.abort(one, "client")
        for batch in (updates, step_of(core)):
            assert not ended.intersection(batch)
            for one, update in batch.items():
                got[one] += update
            ended.update(one for one, u in batch.items() if u.finish or u.error)
        check(core)
        if faults is not None:
            faults.strike()
        if not core.has_work and step > max(job.arrives_at for job in jobs):
            break
    assert core.num_pages_used == core.num_running == core.num_waiting == 0
    assert not core._live
    COUNTED["preempted"] += sum(one.num_preemptions for one in sequences)
    return list(got.values())


def step_of(core: EngineCore) -> dict[Sequence, Update]:
    try:
        return core.step()
    except Exception as error:  # noqa: BLE001 - as the engine's loop does
        COUNTED["failed"] += 1
        return core.fail_step(error)


def check(core: EngineCore) -> None:
    """Every page, slot and queued token is accounted for after every step."""
    scheduler, pages = core._scheduler, core._scheduler._pages
    running, waiting = scheduler.running, scheduler.waiting
    assert set(core._live) == {*running, *waiting}
    assert scheduler._num_queued_tokens == sum(one.num_tokens for one in waiting)
    slots = [one.slot for one in running if one.slot is not None]
    assert sorted([*slots, *scheduler._free_slots]) == list(range(6))
    owned = [page for one in running for page in one.pages]
    assert all(one.slot is None and not one.pages for one in waiting)
    assert [owned.count(page) for page in range(pages.num_pages)] == pages._num_owners
    assert sorted([*set(owned), *pages._blank, *pages._idle]) == list(range(pages.num_pages))
    assert {page: key for key, page in pages._found.items()} == pages._keys
    assert not pages._keys.keys() & pages._blank.keys()
    assert pages._idle.keys() <= pages._keys.keys()


def compare(given: Update, alone: Update, job: Job) -> None:
    assert given.token_ids == alone.token_ids[: len(given.token_ids)]
    if given.error is not None or (job.leaves_at >= 0 and given.token_ids != alone.token_ids):
        return
    finish, expected = given.finish, alone.finish
    if finish is None and job.leaves_at >= 0:  # an abort tells nobody
        return
    assert finish is not None
    assert expected is not None
    if finish.reason is not expected.reason:
        assert job.leaves_at >= 0
        return
    COUNTED["compared"] += 1
    COUNTED["cached"] += finish.num_cached_tokens
    assert given.text == alone.text
    compare_statistics(finish, expected)
    for reports in ("logprobs", "prompt_logprobs"):
        mine, theirs = getattr(given, reports), getattr(alone, reports)
        assert [one.token_id for one in mine] == [one.token_id for one in theirs]
        values, others = (
            torch.tensor([one.logprob for one in all_of]) for all_of in (mine, theirs)
        )
        assert torch.allclose(values, others, atol=1e-3)


def compare_statistics(finish: Finish, expected: Finish) -> None:
    given, alone = finish.statistics, expected.statistics
    assert given.phase(Phase.DECODE) == alone.phase(Phase.DECODE)
    blocks, cached = -(-finish.num_prompt_tokens // BLOCK), finish.num_cached_tokens // BLOCK
    pairs = (blocks * (blocks + 1) - cached * (cached + 1)) // 2
    assert given.phase(Phase.PREFILL).blocks_total == 2 * 4 * pairs
    assert cached or given == alone


@pytest.fixture(scope="module")
def roomy(tiny_model_dir):
    return engine_of(tiny_model_dir, num_pages=100, run_ahead=False)


@pytest.fixture(scope="module")
def matcher(roomy):
    digits = Grammar("regex", "[0-9]{4}( [0-9]{4}){1,8}", "response_format")
    return asyncio.run(GrammarCompiler(roomy.tokenizer).matcher(digits))


@pytest.mark.parametrize("seed", range(6))
def test_whoever_hears_of_no_fault_gets_what_it_gets_alone(
    tiny_model_dir, roomy, matcher, seed, monkeypatch
):
    rng = random.Random(seed)
    jobs = jobs_of(rng, matcher)
    alone = [play(roomy.core, [stays(job)])[0] for job in jobs]
    tight = engine_of(tiny_model_dir, rng.choice([13, 20, 60]), run_ahead=seed % 2 == 1)
    faults = Faults(tight, rng, monkeypatch)
    for given, expected, job in zip(play(tight.core, jobs, faults), alone, jobs, strict=True):
        compare(given, expected, job)


def stays(job: Job) -> Job:
    """The same request alone: salted, so that it computes all of its prompt, and to its end."""
    return Salted(**{**vars(job), "arrives_at": 0, "leaves_at": -1})


class Salted(Job):
    """A job that shares nothing."""

    def sequence(self) -> Sequence:
        one = super().sequence()
        one.prefix = None
        return one


def test_all_of_it_did_happen():
    assert all(COUNTED.values()), COUNTED
