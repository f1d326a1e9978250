"""Log-probabilities of prompts, however they are cut, against the model alone."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from service.engine.prompt_logprobs import num_prompt_rows, prompt_reports
from service.engine.scheduler import Chunk
from service.engine.sequence import SamplingParams
from tests.service.engine.driving import prompt_of
from tests.service.engine.stepping import NUM_PAGES, Request, engine_of, play

REPORTED = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, prompt_logprobs=3)


@pytest.fixture(scope="module")
def plain_logprobs(tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()

    @torch.inference_mode()
    def logprobs(ids):
        return model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)

    return logprobs


@pytest.mark.parametrize("run_ahead", [False, True])
@pytest.mark.parametrize("num_pages", [NUM_PAGES, 200])
def test_every_prompt_token_is_reported_once(tiny_model_dir, plain_logprobs, run_ahead, num_pages):
    """With few pages sequences give way and compute their prompts again."""
    engine: Any = engine_of(tiny_model_dir, num_pages, run_ahead=run_ahead)
    lengths = [1, 2, 17, 60, 90] if num_pages == NUM_PAGES else [1, 300, 700, 40]
    requests = [Request(prompt_of(n, seed=n), "dense@v1", REPORTED) for n in lengths]
    requests.append(Request(prompt_of(30), "dense@v1", SamplingParams(max_tokens=5)))
    got = play(engine.core, requests)
    assert (engine.events.num_preempted > 0) == (num_pages == NUM_PAGES)
    assert got[-1][1].prompt_logprobs == ()
    for sequence, update in got[:-1]:
        ids = sequence.prompt_ids
        assert [position.token_id for position in update.prompt_logprobs] == ids[1:]
        expected = plain_logprobs(ids)
        for place, position in enumerate(update.prompt_logprobs):
            row = expected[place]
            assert position.logprob == pytest.approx(float(row[ids[place + 1]]), abs=1e-3)
            best = row.topk(3)
            assert [value for _, value in position.top] == pytest.approx(
                best.values.tolist(), abs=1e-3
            )
            assert position.top[0][0] == int(best.indices[0])


def test_rows_are_those_before_a_prompt_token():
    sequence = Request(prompt_of(40), "dense@v1", REPORTED).sequence(0)
    assert num_prompt_rows(Chunk(sequence, 0, 16)) == 16
    assert num_prompt_rows(Chunk(sequence, 16, 24)) == 23
    assert num_prompt_rows(Chunk(sequence, 40, 1)) == 0
    sequence.output_ids = [7]  # it gave way after its first token, with which the report came
    assert num_prompt_rows(Chunk(sequence, 0, 16)) == 0
    silent = Request(prompt_of(40), "dense@v1", SamplingParams()).sequence(0)
    assert num_prompt_rows(Chunk(silent, 0, 16)) == 0


def test_a_part_that_is_missing_is_noticed():
    """Or the places of all tokens after it would be wrong."""
    sequence = Request(prompt_of(40), "dense@v1", REPORTED).sequence(0)
    [report] = prompt_reports(torch.zeros(16, 4096), [Chunk(sequence, 16, 16)])
    with pytest.raises(ValueError, match="from 16 on"):
        report.extend([])
