import gc
import math
from collections import Counter
from dataclasses import replace
from typing import cast

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from service.engine.sampled import Sampled
from service.engine.sampler import Sampler
from service.engine.sequence import SamplingParams, Sequence
from sparse_methods.method import SparseAttentionMethod

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0.0)
EOS = 3
VOCAB = 37  # no multiple of a vector register


def sequence(
    sampling: SamplingParams,
    seed: int = 0,
    prompt_ids: list[int] | None = None,
    output_ids: list[int] | None = None,
) -> Sequence:
    return Sequence(
        request_id=str(seed),
        prompt_ids=list(prompt_ids or [0]),
        method=cast(SparseAttentionMethod, None),
        sampling=sampling,
        generator=torch.Generator().manual_seed(seed),
        output_ids=list(output_ids or []),
    )


def sampler(vocab_size: int = VOCAB) -> Sampler:
    return Sampler(CPU, vocab_size, frozenset({EOS}))


def random_logits(num_rows: int, seed: int, vocab_size: int = VOCAB) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


def penalised(logits: list[float], seq: Sequence) -> list[float]:
    """Biases, penalties and minimum length, token by token."""
    params, result = seq.sampling, []
    for token_id, logit in enumerate(logits):
        logit += dict(params.logit_bias).get(token_id, 0.0)
        count = seq.output_ids.count(token_id)
        if token_id in seq.prompt_ids or count:
            factor = params.repetition_penalty
            logit = logit / factor if logit > 0 else logit * factor
        logit -= params.frequency_penalty * count + params.presence_penalty * (count > 0)
        stops = set(params.stop_token_ids) | (set() if params.ignore_eos else {EOS})
        if len(seq.output_ids) < params.min_tokens and token_id in stops:
            logit = -math.inf
        result.append(logit)
    return result


def limited(logits: list[float], params: SamplingParams) -> list[float]:
    """Probabilities after temperature, top-k, top-p and min-p, token by token."""
    best = max(logits)
    weights = [math.exp((logit - best) / params.temperature) for logit in logits]
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    kept = order[: params.top_k or len(order)]
    total = sum(weights[i] for i in kept)
    nucleus, mass = [], 0.0
    for i in kept:
        distance = mass - params.top_p * total
        assume(abs(distance) > 1e-5 * total or params.top_p == 1)
        if distance < 0 or params.top_p == 1:
            nucleus.append(i)
        mass += weights[i]
    assume(all(abs(weights[i] - params.min_p) > 1e-5 for i in nucleus if i != order[0]))
    nucleus = [i for i in nucleus if weights[i] >= params.min_p]
    total = sum(weights[i] for i in nucleus)
    return [weights[i] / total if i in nucleus else 0.0 for i in range(len(logits))]


def expected_token(logits: list[float], seq: Sequence, uniform: float) -> int:
    values = penalised(logits, seq)
    if seq.sampling.temperature == 0:
        first, second = sorted(values, reverse=True)[:2]
        assume(first - second > 1e-5)
        return values.index(first)
    mass = 0.0
    for token_id, probability in enumerate(limited(values, seq.sampling)):
        mass += probability
        assume(abs(mass - uniform) > 1e-5)
        if uniform < mass:
            return token_id
    raise AssertionError


samplings = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 0, 1, 5, VOCAB, 1000]),
    top_p=st.sampled_from([1.0, 1.0, 0.9, 0.3, 0.01]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.5, 0.7]),
    presence_penalty=st.sampled_from([0.0, 0.0, 1.5, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.8, -0.5]),
    min_tokens=st.integers(0, 4),
    stop_token_ids=st.sampled_from([(), (5, 8), (5, 10**6, -1)]),
    ignore_eos=st.booleans(),
    logprobs=st.sampled_from([None, None, 0, 3]),
    logit_bias=st.sampled_from([(), (), ((7, 2.5), (0, -100.0)), ((VOCAB - 1, 100.0),)]),
)
ids = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=8)
rows = st.tuples(samplings, st.integers(0, 2**32), ids, ids)


@settings(max_examples=400)
@given(rows, st.integers(0, 1000))
def test_one_row_is_sampled_as_token_by_token_arithmetic_says(row, logits_seed):
    logits = random_logits(1, logits_seed)
    uniform = torch.rand(
        (), dtype=torch.float64, generator=torch.Generator().manual_seed(row[1])
    ).item()
    expected = expected_token(logits[0].tolist(), sequence(*row), uniform)
    assert sampler().sample(logits, [sequence(*row)]).result().token_ids == [expected]


@settings(max_examples=150)
@given(st.lists(rows, min_size=1, max_size=9), st.integers(0, 1000))
def test_a_row_alone_is_the_row_in_any_batch(batch, logits_seed):
    logits = random_logits(len(batch), logits_seed)
    together = sampler().sample(logits, [sequence(*row) for row in batch]).result()
    for i, row in enumerate(batch):
        alone = sampler().sample(logits[i : i + 1].clone(), [sequence(*row)]).result()
        assert alone.token_ids == [together.token_ids[i]]
        assert alone.logprobs[0] == together.logprobs[i]


def test_rows_of_a_large_vocabulary_do_not_depend_on_the_batch_either():
    vocab_size = 50_257
    logits = random_logits(16, 0, vocab_size)
    params = SamplingParams(top_p=0.95)
    large = sampler(vocab_size)
    together = large.sample(logits, [sequence(params, i) for i in range(16)]).result().token_ids
    for i in range(16):
        alone = large.sample(logits[i : i + 1].clone(), [sequence(params, i)]).result()
        assert alone.token_ids == [together[i]]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_tokens_are_drawn_as_often_as_the_softmax_says(temperature):
    num_rows = 20_000
    logits = random_logits(1, 7, 12) / 3
    params = SamplingParams(temperature=temperature)
    sequences = [sequence(params, seed) for seed in range(num_rows)]
    drawn = Counter(sampler(12).sample(logits.expand(num_rows, -1), sequences).result().token_ids)
    expected = (logits[0].double() / temperature).softmax(-1) * num_rows
    assert chisquare([drawn[i] for i in range(12)], expected.numpy()).pvalue > 0.001


def test_a_bias_forces_or_forbids_a_token_and_no_report_shows_it():
    logits = random_logits(1, 1)
    best = int(logits.argmax())
    reported = {}
    for bias in ((), ((best, -100.0),), ((5, 100.0),)):
        seq = sequence(replace(GREEDY, logit_bias=bias, logprobs=2))
        result = sampler().sample(logits.clone(), [seq]).result()
        report = result.logprobs[0]
        assert report is not None
        reported[bias] = (result.token_ids[0], report.top)
    tokens, tops = zip(*reported.values(), strict=True)
    assert tokens[0] == best
    assert tokens[1] not in {best, 5}
    assert tokens[2] == 5
    assert len(set(tops)) == 1


def test_a_seed_gives_the_same_tokens_again_and_another_seed_others():
    logits = random_logits(30, 1)

    def tokens(seed: int) -> list[int]:
        seq = sequence(SamplingParams(), seed)
        return [sampler().sample(row[None], [seq]).result().token_ids[0] for row in logits]

    assert tokens(5) == tokens(5)
    assert tokens(5) != tokens(6)


def test_greedy_takes_the_lowest_id_of_equals_and_leaves_the_generator_alone():
    logits = torch.zeros(2, VOCAB)
    logits[:, [9, 4, 30]] = 1.0
    seq = sequence(GREEDY)
    before = seq.generator.get_state()
    top_1 = sequence(SamplingParams(top_k=1), seed=3)
    assert sampler().sample(logits, [seq, top_1]).result().token_ids == [4, 4]
    assert torch.equal(seq.generator.get_state(), before)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-300])
def test_a_temperature_near_zero_is_greedy(temperature):
    logits = random_logits(4, 2) * 100
    cold = [sequence(SamplingParams(temperature=temperature), seed) for seed in range(4)]
    assert sampler().sample(logits, cold).result().token_ids == logits.argmax(-1).tolist()


def test_impossible_tokens_are_never_drawn():
    logits = torch.full((200, VOCAB), -torch.inf)
    logits[:, [0, 17, VOCAB - 1]] = 0.0
    drawn = sampler().sample(logits, [sequence(SamplingParams(), i) for i in range(200)]).result()
    assert set(drawn.token_ids) == {0, 17, VOCAB - 1}
    assert drawn.failed == []


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_fails_and_no_other(broken, temperature):
    params = SamplingParams(temperature=temperature, logprobs=2, top_p=0.9, presence_penalty=0.5)
    logits = random_logits(3, 3)
    healthy = sampler().sample(logits, [sequence(params, i) for i in range(3)]).result()
    logits[1, 20] = broken
    result = sampler().sample(logits, [sequence(params, i) for i in range(3)]).result()
    assert result.failed == [1]
    assert result.token_ids == [healthy.token_ids[0], -1, healthy.token_ids[2]]
    assert result.logprobs == [healthy.logprobs[0], None, healthy.logprobs[2]]


def test_a_row_without_any_possible_token_fails():
    result = (
        sampler().sample(torch.full((1, VOCAB), -torch.inf), [sequence(SamplingParams())]).result()
    )
    assert (result.token_ids, result.failed) == ([-1], [0])


def test_logprobs_are_those_of_the_untouched_logits():
    params = SamplingParams(
        temperature=0.0, logprobs=2, repetition_penalty=1000.0, min_tokens=5, top_k=1
    )
    logits = torch.zeros(1, VOCAB)
    logits[0, EOS], logits[0, 6], logits[0, 7] = 3.0, 2.0, 1.0
    raw = logits[0].log_softmax(-1).tolist()
    result = sampler().sample(logits, [sequence(params, prompt_ids=[6])]).result()
    [report] = result.logprobs
    assert report is not None
    assert report.token_id == result.token_ids[0] == 7
    assert report.logprob == pytest.approx(raw[7])
    assert [token_id for token_id, _ in report.top] == [EOS, 6]
    assert [logprob for _, logprob in report.top] == pytest.approx([raw[EOS], raw[6]])


def test_each_row_reports_as_many_logprobs_as_it_asked_for_and_no_impossible_ones():
    logits = torch.full((4, 6), -torch.inf)
    logits[:, :2] = torch.tensor([1.0, 0.0])
    wanted = [None, 0, 1, 6]
    sequences = [sequence(replace(GREEDY, logprobs=num)) for num in wanted]
    reports = sampler(6).sample(logits, sequences).result().logprobs
    assert reports[0] is None
    assert [len(report.top) for report in reports[1:] if report is not None] == [0, 1, 2]


def test_penalties_follow_the_output_as_it_grows():
    params = SamplingParams(temperature=0.0, presence_penalty=2.0)
    seq, one = sequence(params, prompt_ids=[10**6, 2]), sampler(4)
    logits = torch.tensor([[3.0, 2.5, 2.0, 0.0]])
    for expected in (0, 1, 2, 0):
        [token_id] = one.sample(logits, [seq]).result().token_ids
        assert token_id == expected
        seq.output_ids.append(token_id)


def test_the_histories_of_ended_sequences_are_forgotten():
    one, seq = sampler(), sequence(SamplingParams(presence_penalty=1.0))
    one.sample(random_logits(1, 0), [seq]).result()
    assert len(one._histories) == 1
    del seq
    gc.collect()
    assert len(one._histories) == 0


def test_columns_beyond_the_vocabulary_are_padding_and_logits_are_left_as_they_were():
    logits = random_logits(2, 4, VOCAB + 27).to(torch.bfloat16)
    logits[:, VOCAB:] = 100.0
    before = logits.clone()
    params = replace(GREEDY, presence_penalty=1.0, min_tokens=3)
    drawn = (
        sampler().sample(logits, [sequence(params), sequence(SamplingParams(logprobs=3))]).result()
    )
    assert max(drawn.token_ids) < VOCAB
    assert torch.equal(logits, before)


def test_a_model_may_have_fewer_columns_than_the_tokenizer_has_ids():
    params = replace(GREEDY, presence_penalty=5.0, min_tokens=3, stop_token_ids=(VOCAB - 1, 1))
    seq = sequence(params, prompt_ids=[VOCAB - 1], output_ids=[VOCAB - 1, 0])
    assert sampler().sample(torch.tensor([[3.0, 2.0, 1.0]]), [seq]).result().token_ids == [2]


@settings(max_examples=100)
@given(samplings, st.integers(0, 1000))
def test_tokens_that_the_host_learns_late_change_nothing(sampling, seed):
    """One sequence gets each token before the next is chosen, the other one step later."""
    prompt_ids = [1, 2, 30]
    prompt, late = sequence(sampling, seed, prompt_ids), sequence(sampling, seed, prompt_ids)
    one, other = sampler(), sampler()
    given_late: list[Sampled] = []
    for step in range(6):
        logits = random_logits(1, seed + step)
        [token_id] = one.sample(logits, [prompt]).result().token_ids
        prompt.output_ids.append(token_id)
        given_late.append(other.sample(logits, [late]))
        late.num_pending_tokens += 1
        if late.num_pending_tokens > 1:
            late.output_ids += given_late[-2].result().token_ids
            late.num_pending_tokens -= 1
    assert [each.result().token_ids[0] for each in given_late] == prompt.output_ids


def test_a_step_without_rows_chooses_nothing():
    result = sampler().sample(random_logits(1, 0)[:0], []).result()
    assert (result.token_ids, result.logprobs, result.failed) == ([], [], [])


def test_greedy_rows_are_chosen_in_the_model_s_own_precision():
    logits = random_logits(5, 6).to(torch.bfloat16)
    logits[0, 7:9] = 100.0  # equals: the first one
    chosen = sampler().sample(logits, [sequence(GREEDY, i) for i in range(5)]).result().token_ids
    assert chosen == logits.float().argmax(-1).tolist()
    assert chosen[0] == 7
