"""The engine on a tiny model: what batching, chunking and preemption must not change."""

import dataclasses
import re

import pytest

from service.engine.grammar import Grammar
from service.engine.sequence import FinishReason
from service.errors import BadRequestError, ModelNotSupportedError, PromptTooLongError
from sparse_methods import Phase, UnsupportedError, get_sparse_method
from tests.service.engine.driving import METHODS, prompt_of, request, run, wait_until


def mixed_requests():
    lengths = [1, 15, 130, 300, 17, 257, 128, 600, 40]
    return [
        request(prompt_of(length, seed=i), *METHODS[i % 3], max_tokens=6 + 3 * i)
        for i, length in enumerate(lengths)
    ]


def test_a_mixed_batch_gives_each_request_the_tokens_it_gets_alone(engine):
    requests = mixed_requests()
    alone = [run(engine, one)[0] for one in requests]
    together = run(engine, *requests)
    for (tokens, text, finish), (same_tokens, same_text, same_finish) in zip(
        alone, together, strict=True
    ):
        assert tokens == same_tokens
        assert text == same_text
        assert finish[0].statistics == same_finish[0].statistics
    wait_until(lambda: engine.status().num_pages_used == 0)


@pytest.mark.parametrize(("method", "knobs"), METHODS)
def test_statistics_are_the_same_whatever_the_chunking(running, method, knobs):
    requests = [
        request(prompt_of(length, seed=length), method, knobs)
        for length in (1, 127, 128, 129, 1000)
    ]
    results = []
    for max_step_tokens in (256, 384, 2048):
        with running(max_step_tokens=max_step_tokens) as one:
            results.append(run(one, *requests))
    for others in results[1:]:
        for (tokens, _, finish), (same_tokens, _, same_finish) in zip(
            results[0], others, strict=True
        ):
            assert tokens == same_tokens
            assert finish[0].statistics == same_finish[0].statistics
    for (_, _, finish), one in zip(results[0], requests, strict=True):
        check_totals(finish[0].statistics, len(one.prompt_ids), one.sampling.max_tokens)
    long = results[0][-1][2][0].statistics.overall
    if method == "dense":
        assert long.density == 1.0
    else:
        assert 0 < long.density < 1
    if method == "flash_skip_softmax":
        assert 0 < long.blocks_skipped < long.blocks_total


def check_totals(statistics, num_prompt, num_generated, block=128, heads=4, layers=2):
    """Totals, counted by hand: block pairs that causality leaves visible."""
    tiles = -(-num_prompt // block)
    prefill = statistics.phase(Phase.PREFILL)
    assert prefill.blocks_total == layers * heads * tiles * (tiles + 1) // 2
    # The last token is chosen but never attended from.
    lengths = range(num_prompt + 1, num_prompt + num_generated)
    decode = statistics.phase(Phase.DECODE)
    assert decode.blocks_total == layers * heads * sum(-(-n // block) for n in lengths)
    key_bytes = 2 * 16 * 2 * 4  # KV heads, head dim, keys and values, bytes
    assert decode.kv_bytes_dense == layers * key_bytes * sum(lengths)
    assert 0 <= decode.kv_bytes_read <= decode.kv_bytes_dense


def test_preemption_changes_neither_tokens_nor_statistics(running):
    requests = [request(prompt_of(200, seed=i), *METHODS[i % 3], max_tokens=300) for i in range(6)]
    with running() as roomy:
        expected = run(roomy, *requests)
        assert roomy.events.num_preempted == 0
    page_bytes = 128 * 2 * 2 * 2 * 16 * 4
    with running(kv_cache_bytes=7 * page_bytes, max_context_tokens=512) as tight:
        results = run(tight, *requests)
        assert tight.events.num_preempted > 0
        wait_until(lambda: tight.status().num_pages_used == 0)
    for (tokens, _, finish), (same_tokens, _, same_finish) in zip(expected, results, strict=True):
        assert tokens == same_tokens
        assert finish[0].statistics == same_finish[0].statistics


def test_choices_of_one_request_differ_and_a_seed_reproduces_them(engine):
    one = request(prompt_of(20), n=3, temperature=2.0, seed=11, max_tokens=12)
    first, again = run(engine, one)[0], run(engine, one)[0]
    assert first[0] == again[0]
    assert len({tuple(tokens) for tokens in first[0].values()}) == 3


def test_a_generation_ends_by_length_stop_token_or_stop_string(engine):
    tokens, text, finish = run(engine, request(prompt_of(20), max_tokens=10))[0]
    assert (finish[0].reason, len(tokens[0])) == (FinishReason.LENGTH, 10)
    third = tokens[0][2]
    cut = tokens[0].index(third) + 1
    stopped = run(engine, request(prompt_of(20), max_tokens=10, stop_token_ids=(third,)))[0]
    assert stopped[0][0] == tokens[0][:cut]
    assert (stopped[2][0].reason, stopped[2][0].stop_reason) == (FinishReason.STOP, third)
    word = text[0][3:6]
    by_text = run(engine, request(prompt_of(20), max_tokens=10, stop=(word,)))[0]
    assert by_text[1][0] == text[0][: text[0].index(word)]
    assert by_text[2][0].stop_reason == word


def test_the_answer_is_cut_where_the_context_ends(running):
    with running(max_context_tokens=64) as small:
        _, _, finish = run(small, request(prompt_of(60), max_tokens=50))[0]
        assert finish[0].num_generated_tokens == 4
        assert finish[0].reason is FinishReason.LENGTH
        with pytest.raises(PromptTooLongError, match=r"64.*"):
            run(small, request(prompt_of(64)))


@pytest.mark.parametrize("prompt", [[], [-1], [5, 4096]])
def test_a_prompt_of_no_or_unknown_tokens_is_refused(engine, prompt):
    with pytest.raises(BadRequestError):
        run(engine, request(prompt))


@pytest.mark.parametrize(
    ("version", "knobs", "words"),
    [
        ("v1", {"br": 64, "bc": 64}, "128"),
        ("v2", {"target_sparsity": 0.5}, "needs a calibration"),
    ],
)
def test_a_method_that_cannot_be_served_is_refused(engine, version, knobs, words):
    method = get_sparse_method("flash_skip_softmax", version)(knobs)
    with pytest.raises(UnsupportedError, match=words):
        run(engine, dataclasses.replace(request(prompt_of(5)), method=method))


def test_settings_of_one_request_do_not_leak_into_another(engine):
    greedy = request(prompt_of(30))
    wild = dataclasses.replace(
        greedy, sampling=dataclasses.replace(greedy.sampling, temperature=2.0, top_k=50)
    )
    alone = run(engine, greedy)[0][0]
    assert run(engine, wild, greedy, wild)[1][0] == alone


@pytest.mark.parametrize("limits", [{"max_context_tokens": 128}, {"max_context_tokens": 16}])
def test_the_smallest_cache_still_serves(running, limits):
    with running(max_running_requests=1, **limits) as small:
        tokens, _, _ = run(small, request(prompt_of(10), max_tokens=4))[0]
        assert len(tokens[0]) == 4


def test_a_cache_without_room_is_refused_at_load(running):
    with (
        pytest.raises(ModelNotSupportedError, match="KV_CACHE_BYTES"),
        running(kv_cache_bytes=1000),
    ):
        pass


def test_high_bits_of_a_seed_count(engine):
    def tokens(seed):
        one = request(prompt_of(20), temperature=2.0, seed=seed, max_tokens=12)
        return run(engine, one)[0][0][0]

    assert tokens(7) == tokens(7) != tokens(7 + 2**32)


def test_a_bias_reaches_the_sampler_and_an_unknown_token_is_refused(engine):
    ((tokens, _, _),) = run(engine, request(prompt_of(9), logit_bias=((77, 100.0),)))
    assert tokens[0] == [77] * 8
    with pytest.raises(BadRequestError, match="from 0 to 4095"):
        run(engine, request(prompt_of(9), logit_bias=((4096, 1.0),)))


def test_a_text_is_held_to_its_grammar_and_its_neighbours_are_not(engine):
    grammar = Grammar("regex", "(yes|no), [0-9]{5}", "response_format")
    held = request(prompt_of(30), temperature=1.0, max_tokens=40, ignore_eos=False, n=3)
    held = dataclasses.replace(held, sampling=dataclasses.replace(held.sampling, grammar=grammar))
    free = request(prompt_of(30), max_tokens=20)
    (_, texts, finishes), (tokens, _, _) = run(engine, held, free)
    assert all(re.fullmatch(grammar.source, text) for text in texts.values())
    assert {finish.reason for finish in finishes.values()} == {FinishReason.STOP}
    assert tokens == run(engine, free)[0][0]


def test_an_impossible_grammar_is_refused(engine):
    grammar = Grammar("json_schema", "false", "response_format")
    with pytest.raises(BadRequestError, match="not usable"):
        run(engine, request(prompt_of(5), grammar=grammar))


def test_a_prompt_of_an_earlier_request_is_reused_and_told(running):
    one = request(prompt_of(300), max_tokens=4)
    with running(prefix_caching=True) as caching:
        results = [run(caching, one)[0]]
        results.append(run(caching, one)[0])
        results.append(run(caching, dataclasses.replace(one, cache_salt="mine"))[0])
        results.append(run(caching, dataclasses.replace(one, reuses_prefix=False))[0])
        wait_until(lambda: caching.status().num_pages_used == 0)
    assert [finish[0].num_cached_tokens for _, _, finish in results] == [0, 256, 0, 0]
    assert all(tokens == results[0][0] for tokens, _, _ in results)


def test_choices_of_one_request_compute_its_prompt_once(running):
    one = request(prompt_of(300), n=3, temperature=2.0, seed=11)
    with running() as plain:
        expected, _, _ = run(plain, one)[0]
    with running(prefix_caching=True) as caching:
        tokens, _, finish = run(caching, one)[0]
    assert tokens == expected
    assert sorted(f.num_cached_tokens for f in finish.values()) == [0, 256, 256]
