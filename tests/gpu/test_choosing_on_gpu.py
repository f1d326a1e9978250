"""Biases, grammars and reports on prompts on a CUDA device: as on the CPU, and nobody waits."""

import asyncio
import dataclasses
import re

import pytest
import torch

from service.engine.engine import Engine
from service.engine.generation import build_sequence
from service.engine.grammar import Grammar, GrammarCompiler
from service.engine.sequence import FinishReason, SamplingParams, Sequence, Update
from sparse_methods import get_sparse_method
from tests.gpu.test_engine_on_gpu import engine_on, planted_prompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(300),
]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
BIASED = dataclasses.replace(GREEDY, logit_bias=((700, 4.0), (27, -100.0)))
REPORTED = dataclasses.replace(GREEDY, prompt_logprobs=3)


@pytest.fixture(scope="module")
def on_gpu():
    return engine_on("cuda")


def add(engine: Engine, sampling: SamplingParams, num_prompt: int = 700) -> Sequence:
    prompt = planted_prompt(engine, num_prompt)
    sequence = build_sequence("r", prompt, get_sparse_method("dense")(), sampling, 0)
    engine.core.add(sequence)
    return sequence


def finish(engine: Engine, sequences: list[Sequence]) -> list[Update]:
    """Run all there is to its end; return what these got."""
    got: dict[Sequence, Update] = {}
    while engine.core.has_work:
        for sequence, update in engine.core.step().items():
            got[sequence] = got.get(sequence, Update()) + update
    return [got[sequence] for sequence in sequences]


def test_biases_and_reports_are_those_of_the_cpu(on_gpu):
    on_cpu = engine_on("cpu")
    samplings = [GREEDY, BIASED, REPORTED]
    expected = finish(on_cpu, [add(on_cpu, sampling) for sampling in samplings])
    given = finish(on_gpu, [add(on_gpu, sampling) for sampling in samplings])
    assert [update.token_ids for update in given] == [update.token_ids for update in expected]
    assert given[0].token_ids != given[1].token_ids
    assert len(given[2].prompt_logprobs) == 699
    pairs = zip(given[2].prompt_logprobs, expected[2].prompt_logprobs, strict=True)
    for one, other in pairs:
        assert one.token_id == other.token_id
        assert one.logprob == pytest.approx(other.logprob, abs=2e-3)
        values = [value for _, value in one.top]
        assert values == pytest.approx([value for _, value in other.top], abs=2e-3)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_neither_biases_nor_reports_wait_for_the_device(on_gpu):
    for sampling in (BIASED, REPORTED, REPORTED):
        add(on_gpu, dataclasses.replace(sampling, max_tokens=60), 200)
        for _ in range(3):  # what is compiled and captured on the way is there then
            on_gpu.core.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            on_gpu.core.step()
        add(on_gpu, REPORTED, 200)
        on_gpu.core.step()  # three decode, and a prompt is reported
    finally:
        torch.cuda.set_sync_debug_mode("default")
    finish(on_gpu, [])


def test_a_grammar_holds_while_others_run_ahead(on_gpu):
    pytest.importorskip("llguidance", reason="this machine may have no more than the kernels need")
    digits = Grammar("regex", "[0-9]{4}( [0-9]{4}){1,8}", "response_format")
    matcher = asyncio.run(GrammarCompiler(on_gpu.tokenizer).matcher(digits))
    assert matcher is not None
    alone = finish(on_gpu, [add(on_gpu, GREEDY)])[0].token_ids
    sequences = [add(on_gpu, SamplingParams(max_tokens=60, seed=seed), 300) for seed in range(4)]
    for sequence in sequences:
        sequence.matcher = matcher.fork()
    *held, free = finish(on_gpu, [*sequences, add(on_gpu, GREEDY)])
    assert free.token_ids == alone
    for update in held:
        assert re.fullmatch(digits.source, update.text)
        assert update.finish is not None
        assert update.finish.reason is FinishReason.STOP
