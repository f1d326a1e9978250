"""The engine on a CUDA device against the engine on the CPU, with the built-in model."""

import json
from pathlib import Path

import pytest
import torch

from service.engine.engine import Engine
from service.engine.events import NoEvents
from service.engine.generation import build_sequence
from service.engine.prefix import PrefixKeys
from service.engine.sequence import SamplingParams, Sequence, Update
from service.models.loading import load_model
from service.settings import Settings
from sparse_methods import Phase, SparseAttentionMethod, get_sparse_method, list_sparse_methods

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(300),
]
EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "planted_number.json"
IDS = [(name, version) for name, versions in list_sparse_methods().items() for version in versions]


def engine_on(device: str, *, run_ahead: bool | None = None) -> Engine:
    loaded = load_model(None, device, "float32")
    settings = Settings(kv_cache_bytes=2**31, max_running_requests=32, run_ahead=run_ahead)
    return Engine(settings, loaded, NoEvents())


@pytest.fixture(scope="module")
def on_gpu():
    return engine_on("cuda")


def generate(engine: Engine, requests: list[tuple[str, str]], prompts, num_tokens: int):
    """Tokens of every request, run as one batch, greedy."""
    sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    sequences: list[Sequence] = []
    for index, ((name, version), prompt) in enumerate(zip(requests, prompts, strict=True)):
        method = get_sparse_method(name, version)()
        sequences.append(build_sequence(str(index), prompt, method, sampling, index))
        engine.core.add(sequences[-1])
    statistics = {}
    while engine.core.has_work:
        for sequence, update in engine.core.step().items():
            if update.finish is not None:
                statistics[sequence] = update.finish.statistics
    return [(s.output_ids, statistics[s]) for s in sequences]


def in_force(name: str, version: str) -> SparseAttentionMethod:
    """The method, past its break-even at any length: below it a step would choose nothing."""
    method, never = get_sparse_method(name, version), {"dense_below": 0}
    if name == "hybrid":
        return method({"prefill_params": never, "decode_params": never})
    return method(never if "dense_below" in method.Knobs.model_fields else None)


def planted_prompt(engine: Engine, num_tokens: int) -> list[int]:
    """The end of the example prompt, with its planted number, and the sequence's first token."""
    prompt = engine.tokenizer.encode(json.loads(EXAMPLE.read_text())["prompt"])
    return prompt[:1] + prompt[-num_tokens + 1 :]


@pytest.mark.parametrize(("name", "version"), IDS, ids=["@".join(i) for i in IDS])
def test_tokens_and_statistics_are_those_of_the_cpu(name, version, on_gpu):
    on_cpu = engine_on("cpu")
    prompt = planted_prompt(on_cpu, 1500)
    [expected] = generate(on_cpu, [(name, version)], [prompt], 10)
    [given] = generate(on_gpu, [(name, version)], [prompt], 10)
    assert given[0] == expected[0]
    for one, other in zip(given[1].layers, expected[1].layers, strict=True):
        for phase, counts in one.phases.items():
            assert counts.blocks_total == other.phases[phase].blocks_total
            # Decisions at the very edge may fall the other way where sums are rounded otherwise.
            assert counts.density == pytest.approx(other.phases[phase].density, abs=0.02)


def test_a_mixed_batch_gives_each_request_what_it_gets_alone(on_gpu):
    prompts = [planted_prompt(on_gpu, 300 + 117 * index) for index in range(len(IDS))]
    together = generate(on_gpu, IDS, prompts, 20)
    for request, prompt, (tokens, _) in zip(IDS, prompts, together, strict=True):
        [(alone, _)] = generate(on_gpu, [request], [prompt], 20)
        assert tokens == alone, request


def test_a_row_that_grows_past_its_break_even_goes_on_in_another_graph(on_gpu):
    knobs = {"budget_pages": 2, "top_p": None, "dense_below": 1510}
    method = get_sparse_method("quest", "v1")(knobs)
    sampling = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    ends, shares = [], []
    for engine in (engine_on("cpu"), on_gpu):
        sequence = build_sequence("0", planted_prompt(on_gpu, 1500), method, sampling, 0)
        (texts, [(_, _, statistics)]) = outcomes(engine, [sequence])
        ends.append(texts)
        shares.append(statistics.phase(Phase.DECODE).density)
    assert ends[0] == ends[1]
    # A third of the steps reads all twelve pages, the others two or three of them.
    assert shares[1] == pytest.approx(shares[0], abs=0.02)
    assert 0.35 < shares[1] < 0.6


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_decode_step_does_not_wait_for_the_device(on_gpu):
    from service.engine.kv_cache import PageAllocator
    from service.engine.scheduler import Chunk

    runner, allocator = on_gpu.runner, PageAllocator(on_gpu.runner.num_pages, 128)
    sequences = []
    for index, (name, version) in enumerate(IDS):
        method = in_force(name, version)
        sequence = build_sequence(str(index), list(range(10, 400)), method, SamplingParams(), index)
        sequence.slot = index
        assert allocator.try_reserve(sequence, 395)
        sequences.append(sequence)
    runner.run([Chunk(s, 0, 390) for s in sequences])

    def step():
        for sequence in sequences:
            sequence.output_ids.append(9)
        return runner.run([Chunk(s, s.num_tokens - 1, 1) for s in sequences])

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        logits, _ = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert logits.isfinite().all()


def outcomes(engine: Engine, requests: list[Sequence]):
    """Tokens, texts and the ends of requests run as one batch."""
    got = dict.fromkeys(requests, Update())
    for sequence in requests:
        engine.core.add(sequence)
    while engine.core.has_work:
        for sequence, update in engine.core.step().items():
            got[sequence] += update
    finishes = [update.finish for update in got.values() if update.finish is not None]
    ends = [(finish.reason, finish.stop_reason, finish.statistics) for finish in finishes]
    assert len(ends) == len(requests)
    return [(update.token_ids, update.text) for update in got.values()], ends


@pytest.mark.parametrize(("name", "version"), IDS, ids=["@".join(i) for i in IDS])
def test_a_reused_prompt_gives_the_same_tokens(name, version, on_gpu):
    prompt, method = planted_prompt(on_gpu, 1500), get_sparse_method(name, version)()
    sampling = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)

    def ask(salt: str | None) -> tuple[Sequence, tuple[object, int]]:
        sequence = build_sequence("0", prompt, method, sampling, 0)
        sequence.prefix = PrefixKeys(prompt, 128, method, salt)
        texts, [(_, _, statistics)] = outcomes(on_gpu, [sequence])
        return sequence, (texts, statistics.phase(Phase.DECODE).blocks_total)

    (plain, expected), (first, given), (again, same) = ask("another's"), ask(None), ask(None)
    cached = [one.num_cached_tokens for one in (plain, first, again)]
    assert cached == [0, 0, 1499 // 128 * 128]
    assert given == same == expected


def test_choices_that_share_a_prompt_in_flight_get_what_they_get_alone(on_gpu):
    prompt, method = planted_prompt(on_gpu, 3000), get_sparse_method("flash_skip_softmax")()

    def choices(*, shares: bool) -> list[Sequence]:
        made = []
        for index in range(4):
            sampling = SamplingParams(temperature=0.8, max_tokens=20, seed=3, ignore_eos=True)
            made.append(build_sequence(str(index), prompt, method, sampling, index))
            if shares:
                made[-1].prefix = PrefixKeys(prompt, 128, method, "choices")
        return made

    together = choices(shares=True)
    given, _ = outcomes(on_gpu, together)
    expected = [outcomes(on_gpu, [one])[0][0] for one in choices(shares=False)]
    assert given == expected
    assert sorted(one.num_cached_tokens for one in together) == [0, *[2999 // 128 * 128] * 3]


def test_running_ahead_changes_neither_tokens_nor_texts_nor_statistics(on_gpu):
    waiting = engine_on("cuda", run_ahead=False)

    def requests() -> list[Sequence]:
        made = []
        for index, (name, version) in enumerate(IDS * 2):
            sampling = SamplingParams(
                temperature=index % 3 * 0.5,
                max_tokens=5 + 3 * index,
                top_k=index % 2 * 40,
                presence_penalty=index % 4 * 0.3,
                logprobs=2 if index % 5 == 0 else None,
                stop=("e",) if index % 3 == 1 else (),
                seed=index,
            )
            prompt = planted_prompt(waiting, 200 + 61 * index)
            method = get_sparse_method(name, version)()
            made.append(build_sequence(str(index), prompt, method, sampling, index))
        return made

    assert outcomes(on_gpu, requests()) == outcomes(waiting, requests())


def test_a_step_with_a_prompt_waits_for_nothing_but_the_tokens_of_the_last_one(on_gpu):
    sampling = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    prompt = planted_prompt(on_gpu, 200)

    def arrive(index: int) -> None:
        method = get_sparse_method("dense")()
        on_gpu.core.add(build_sequence(str(index), prompt, method, sampling, index))

    for index in range(3):  # what is compiled, captured and allocated on the way is there then
        arrive(index)
        on_gpu.core.step()
        on_gpu.core.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        arrive(3)
        on_gpu.core.step()  # three decode, one is prefilled
    finally:
        torch.cuda.set_sync_debug_mode("default")
    while on_gpu.core.has_work:
        on_gpu.core.step()


def test_a_whole_step_waits_for_nothing_but_the_tokens_of_the_last_one(on_gpu):
    samplings = [
        SamplingParams(temperature=0, max_tokens=40, ignore_eos=True),
        SamplingParams(max_tokens=40, top_p=0.9, min_p=0.01, min_tokens=30, seed=1),
        SamplingParams(max_tokens=40, presence_penalty=1.0, logprobs=3, min_tokens=40, seed=2),
    ]
    prompt = planted_prompt(on_gpu, 200)
    for index, sampling in enumerate(samplings):
        method = get_sparse_method("dense")()
        on_gpu.core.add(build_sequence(str(index), prompt, method, sampling, index))
    for _ in range(4):
        on_gpu.core.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(8):
            assert len(on_gpu.core.step()) == len(samplings)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    while on_gpu.core.has_work:
        on_gpu.core.step()
