"""Engines that are stepped by hand, with small blocks, and requests of every method for them."""

import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from service.engine.core import EngineCore
from service.engine.engine import Engine
from service.engine.events import NoEvents
from service.engine.generation import build_sequence
from service.engine.grammar import Matcher
from service.engine.prefix import PrefixKeys
from service.engine.sequence import SamplingParams, Sequence, Update
from service.models.loading import load_model
from service.settings import Settings
from sparse_methods import get_sparse_method, list_sparse_methods
from sparse_methods.method import SparseAttentionMethod

BLOCK = 16
PAGE_BYTES = BLOCK * 2 * 2 * 2 * 16 * 4  # layers, KV heads, keys and values, head dim, bytes
NUM_PAGES = 12  # too few for what is asked at once
KNOBS: dict[str, dict[str, Any]] = {  # such that something is left out here
    "block_topk@v1": {"min_blocks": 3},
    "flash_skip_softmax@v1": {
        "threshold": {"prefill": 0.5, "decode": 0.9},
        "br": BLOCK,
        "bc": BLOCK,
    },
    "flash_skip_softmax@v2": {"prefill_threshold": 0.9, "decode_threshold": 0.3},
    "flashprefill@v1": {"alpha": 0.7, "window_blocks": 1},
    "hybrid@v1": {
        "prefill": "flashprefill",
        "prefill_params": {"alpha": 0.7, "window_blocks": 1, "dense_below": 0},
        "decode": "quest",
        "decode_params": {"dense_below": 0},
    },
    "predictive_skip@v1": {"threshold": 0.9, "margin": 0.0},
    "snapkv@v1": {"budget_pages": 2},
    "xattention@v1": {"tau": 0.7},
}
IDS = [f"{name}@{version}" for name, all_of in list_sparse_methods().items() for version in all_of]


def method_of(method_id: str) -> SparseAttentionMethod:
    cls = get_sparse_method(*method_id.split("@"))
    knobs = dict(KNOBS.get(method_id, {}))
    if "dense_below" in cls.Knobs.model_fields:
        knobs["dense_below"] = 0
    return cls(knobs)


class Counting(NoEvents):
    def __init__(self):
        self.num_preempted = 0
        self.num_tokens = 0
        self.fallbacks = []

    def fell_back(self, sequence, reason):
        self.fallbacks.append((sequence.request_id, reason))

    def preempted(self):
        self.num_preempted += 1

    def step(self, phase, seconds, num_tokens):
        assert seconds >= 0
        self.num_tokens += num_tokens


@dataclass
class Request:
    prompt_ids: list[int]
    method_id: str
    sampling: SamplingParams
    arrives_at: int = 0
    aborted_at: int | None = None
    matcher: Matcher | None = None

    def sequence(self, index: int) -> Sequence:
        method = method_of(self.method_id)
        sequence = build_sequence(str(index), self.prompt_ids, method, self.sampling, index)
        sequence.matcher = None if self.matcher is None else self.matcher.fork()
        return sequence


def engine_of(directory, num_pages: int = NUM_PAGES, *, run_ahead: bool) -> Engine:
    settings = Settings(
        model=directory,
        method="dense",
        block_size=BLOCK,
        kv_cache_bytes=num_pages * PAGE_BYTES,
        max_step_tokens=256,
        max_running_requests=6,
        run_ahead=run_ahead,
    )
    return Engine(settings, load_model(directory, "cpu", "float32"), Counting())


def play(core: EngineCore, requests: list[Request]) -> list[tuple[Sequence, Update]]:
    """Everything that each request got, added up, once all is done."""
    sequences = [request.sequence(index) for index, request in enumerate(requests)]
    got = dict.fromkeys(sequences, Update())
    step = 0
    while core.has_work or step <= max(request.arrives_at for request in requests):
        for sequence, request in zip(sequences, requests, strict=True):
            if request.arrives_at == step:
                core.add(sequence)
            if request.aborted_at == step:
                core.abort(sequence, "client")
        for sequence, update in core.step().items():
            assert got[sequence].finish is None
            assert got[sequence].error is None
            got[sequence] += update
        step += 1
        assert step < 5000, "it never ends"
    assert core.num_pages_used == core.num_running == core.num_waiting == 0
    return list(got.items())


def sampling_of(rng: random.Random) -> SamplingParams:
    choices: dict[str, list[Any]] = {
        "temperature": [0.0, 0.0, 1.0, 1.5],
        "max_tokens": [1, 2, 7, 40, 60],
        "min_tokens": [0, 0, 3],
        "top_k": [0, 0, 20],
        "top_p": [1.0, 1.0, 0.9],
        "presence_penalty": [0.0, 0.0, 1.0],
        "repetition_penalty": [1.0, 1.0, 1.3],
        "logprobs": [None, None, 2],
        "stop": [(), (), ("e",), ("th", "a")],
        "ignore_eos": [False, True],
    }
    drawn = {name: rng.choice(values) for name, values in choices.items()}
    stop_token_ids = tuple(rng.sample(range(8, 4096), rng.choice([0, 0, 300])))
    return SamplingParams(**drawn, stop_token_ids=stop_token_ids, seed=rng.randrange(2**32))


def requests_of(seed: int) -> list[Request]:
    rng = random.Random(seed)
    greedy = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    crowding = [Request([9 + seed, *range(60, 110)], "dense@v1", greedy, 20) for _ in range(2)]
    return crowding + [
        Request(
            prompt_ids=[
                rng.randrange(8, 4096) for _ in range(rng.choice([1, 15, 16, 17, 50, 120]))
            ],
            method_id=rng.choice(IDS),
            sampling=sampling_of(rng),
            arrives_at=rng.choice([0, 0, 0, rng.randrange(40)]),
        )
        for _ in range(rng.randint(1, 12))
    ]


def assert_alike(given: Update, expected: Update) -> None:
    assert given.token_ids == expected.token_ids
    assert given.text == expected.text
    assert given.finish is not None
    assert expected.finish is not None
    timing = expected.finish.timing
    assert replace(given.finish, timing=timing) == expected.finish
    assert len(given.logprobs) == len(expected.logprobs)
    for one, other in zip(given.logprobs, expected.logprobs, strict=True):
        assert one.token_id == other.token_id
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


def tokens_of(seed: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(8, 4000, (length,), generator=generator).tolist()


def sequence_of(prompt_ids, method="dense@v1", salt=None, index=0, **sampling) -> Sequence:
    if isinstance(method, str):
        method = method_of(method)
    sampling = {"temperature": 0.0, "max_tokens": 6, "ignore_eos": True, **sampling}
    one = build_sequence("r", prompt_ids, method, SamplingParams(**sampling), index)
    one.prefix = PrefixKeys(prompt_ids, BLOCK, method, salt)
    return one
