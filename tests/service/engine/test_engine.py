"""The engine on a tiny model: what batching, chunking, preemption and faults must not change."""

import asyncio
import contextlib
import dataclasses
import re
import time

import pytest
import torch

from service.engine.engine import Engine
from service.engine.events import NoEvents
from service.engine.generation import GenerationRequest
from service.engine.grammar import Grammar
from service.engine.sequence import FinishReason, SamplingParams
from service.errors import (
    BadRequestError,
    GenerationError,
    ModelNotSupportedError,
    PromptTooLongError,
    QueueFullError,
    QueueTimeoutError,
    UnavailableError,
)
from service.settings import Settings
from sparse_methods import Phase, UnsupportedError, get_sparse_method

SKIP = {"prefill_threshold": 0.3, "decode_threshold": 0.3}
METHODS = [
    ("dense", {}),
    ("streaming", {"window_blocks": 1}),
    ("flash_skip_softmax", SKIP),
]


class Counting(NoEvents):
    def __init__(self):
        self.num_preempted = 0
        self.num_errors = 0
        self.abort_reasons = []

    def preempted(self):
        self.num_preempted += 1

    def engine_error(self, kind):
        self.num_errors += 1

    def aborted(self, reason):
        self.abort_reasons.append(reason)


MODE = {"run_ahead": False}


@pytest.fixture(scope="module", params=[False, True], ids=["waits", "runs-ahead"], autouse=True)
def mode(request):
    """Every test holds for an engine that waits for each step, and for one that does not."""
    MODE["run_ahead"] = request.param


@contextlib.contextmanager
def running(directory, **settings):
    settings = {
        "device": "cpu",
        "method": "dense",
        "max_running_requests": 8,
        "prefix_caching": False,  # what is reused counts nowhere: test_prefix_reuse.py
        **MODE,
        **settings,
    }
    engine = Engine.load(Settings(model=directory, **settings), Counting())
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


@pytest.fixture(scope="module")
def engine(tiny_model_dir, mode):
    with running(tiny_model_dir) as one:
        yield one


def prompt_of(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(8, 4096, (length,), generator=generator).tolist()


def request(prompt_ids, method="dense", knobs=None, *, n=1, **sampling):
    sampling = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True, **sampling}
    return GenerationRequest(
        request_id="r",
        method=get_sparse_method(method)(knobs),
        sampling=SamplingParams(**sampling),
        prompt_ids=prompt_ids,
        n=n,
    )


async def collect(engine, one):
    tokens, text, finishes = {}, {}, {}
    async with await engine.submit(one) as generation:
        async for index, update in generation:
            tokens.setdefault(index, []).extend(update.token_ids)
            text[index] = text.get(index, "") + update.text
            if update.finish is not None:
                finishes[index] = update.finish
    return tokens, text, finishes


def run(engine, *requests):
    async def gather():
        return await asyncio.gather(*(collect(engine, one) for one in requests))

    return asyncio.run(gather())


def wait_until(condition, timeout_s=20):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


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
def test_statistics_are_the_same_whatever_the_chunking(tiny_model_dir, method, knobs):
    requests = [
        request(prompt_of(length, seed=length), method, knobs)
        for length in (1, 127, 128, 129, 1000)
    ]
    results = []
    for max_step_tokens in (256, 384, 2048):
        with running(tiny_model_dir, max_step_tokens=max_step_tokens) as one:
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


def test_preemption_changes_neither_tokens_nor_statistics(tiny_model_dir):
    requests = [request(prompt_of(200, seed=i), *METHODS[i % 3], max_tokens=300) for i in range(6)]
    with running(tiny_model_dir) as roomy:
        expected = run(roomy, *requests)
        assert roomy.events.num_preempted == 0
    page_bytes = 128 * 2 * 2 * 2 * 16 * 4
    with running(tiny_model_dir, kv_cache_bytes=7 * page_bytes, max_context_tokens=512) as tight:
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


def test_the_answer_is_cut_where_the_context_ends(tiny_model_dir):
    with running(tiny_model_dir, max_context_tokens=64) as small:
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


@pytest.mark.parametrize("num_prompt", [10, 3000])
def test_leaving_a_generation_frees_its_pages_at_any_moment(engine, num_prompt):
    async def leave(updates_to_read):
        one = request(prompt_of(num_prompt), max_tokens=900)
        async with await engine.submit(one) as generation:
            async for _ in generation:
                updates_to_read -= 1
                if updates_to_read < 0:
                    return

    before = len(engine.events.abort_reasons)
    asyncio.run(leave(3))

    async def leave_at_once():
        async with await engine.submit(request(prompt_of(num_prompt))):
            pass

    asyncio.run(leave_at_once())
    wait_until(lambda: len(engine.events.abort_reasons) == before + 2)
    wait_until(lambda: engine.status().num_pages_used == 0)
    assert engine.status().num_running == 0


def test_a_failing_step_fails_its_requests_only_and_the_engine_lives_on(engine, monkeypatch):
    original = engine.runner.run

    def fail_once(chunks):
        monkeypatch.setattr(engine.runner, "run", original)
        raise RuntimeError("out of luck")

    before = engine.events.num_errors
    monkeypatch.setattr(engine.runner, "run", fail_once)
    with pytest.raises(GenerationError):
        run(engine, request(prompt_of(20)))
    assert engine.events.num_errors == before + 1
    assert len(run(engine, request(prompt_of(20)))[0][0][0]) == 8
    wait_until(lambda: engine.status().num_pages_used == 0)


def test_logits_that_are_not_numbers_fail_their_own_request_only(engine, monkeypatch):
    original = engine.runner.run

    def poison(chunks):
        logits, completed = original(chunks)
        logits = logits.clone()
        for row, sequence in enumerate(completed):
            if sequence.prompt_ids[0] == 99:
                logits[row] = float("nan")
        return logits, completed

    monkeypatch.setattr(engine.runner, "run", poison)

    async def both():
        return await asyncio.gather(
            collect(engine, request([99, 5, 6])),
            collect(engine, request([98, 5, 6])),
            return_exceptions=True,
        )

    failed, fine = asyncio.run(both())
    assert isinstance(failed, GenerationError)
    assert len(fine[0][0]) == 8


def test_a_full_queue_and_a_draining_engine_refuse(tiny_model_dir):
    limits = {"max_running_requests": 1, "max_waiting_requests": 1}
    with running(tiny_model_dir, **limits) as small:

        async def flood():
            one = request(prompt_of(10), max_tokens=300)
            async with await small.submit(one), await small.submit(one):
                with pytest.raises(QueueFullError):
                    await small.submit(one)

        asyncio.run(flood())
        wait_until(lambda: small.status().num_running == 0)
        small.drain()
        with pytest.raises(UnavailableError, match="draining"):
            run(small, request(prompt_of(5)))
        assert asyncio.run(small.wait_idle(5.0))


def test_the_status_tells_of_a_stalled_and_of_a_dead_engine(tiny_model_dir, monkeypatch):
    with running(tiny_model_dir, stall_timeout_s=0.05) as one:

        def hang():
            time.sleep(0.5)
            return {}

        monkeypatch.setattr(one.core, "step", hang)
        monkeypatch.setattr(type(one.core), "has_work", property(lambda _: True))
        wait_until(lambda: one.status().is_stalled)
        assert "no progress" in one.status().reason
        monkeypatch.undo()
        one.stop()
        assert not one.status().is_alive
        assert one.status().reason


def test_stopping_the_engine_ends_running_generations_with_an_error(tiny_model_dir):
    with running(tiny_model_dir) as one:

        async def stop_meanwhile():
            async with await one.submit(request(prompt_of(5), max_tokens=2000)) as generation:
                async for _ in generation:
                    await asyncio.to_thread(one.stop)

        with pytest.raises(UnavailableError, match="stopped"):
            asyncio.run(stop_meanwhile())
        assert one.events.abort_reasons == ["shutdown"]


def test_settings_of_one_request_do_not_leak_into_another(engine):
    greedy = request(prompt_of(30))
    wild = dataclasses.replace(
        greedy, sampling=dataclasses.replace(greedy.sampling, temperature=2.0, top_k=50)
    )
    alone = run(engine, greedy)[0][0]
    assert run(engine, wild, greedy, wild)[1][0] == alone


def boom(*_):
    raise RuntimeError("broken")


def test_a_broken_device_still_lets_every_client_know(tiny_model_dir, monkeypatch):
    with running(tiny_model_dir) as one:
        monkeypatch.setattr(one.runner, "run", boom)
        monkeypatch.setattr(one.runner, "statistics", boom)
        with pytest.raises(GenerationError):
            run(one, request(prompt_of(5)))
        assert one.status().is_alive
        assert one.status().num_pages_used == 0


def test_a_request_that_ended_in_a_failing_step_gets_its_answer(engine, monkeypatch):
    original = engine.core._text_output

    def brittle(sequence):
        output = original(sequence)
        if sequence.prompt_ids[0] == 99:
            output.push = boom
        return output

    monkeypatch.setattr(engine.core, "_text_output", brittle)

    async def both():
        return await asyncio.gather(
            collect(engine, request([98, 5, 6], max_tokens=1)),
            collect(engine, request([99, 5, 6], max_tokens=5)),
            return_exceptions=True,
        )

    fine, failed = asyncio.run(both())
    assert len(fine[0][0]) == 1
    assert isinstance(failed, GenerationError)
    wait_until(lambda: engine.status().num_pages_used == 0)
    assert engine._loop.num_unfinished == 0


def test_a_request_the_engine_cannot_take_in_fails_alone(engine, monkeypatch):
    monkeypatch.setattr(engine.core, "_text_output", boom)
    with pytest.raises(GenerationError):
        run(engine, request(prompt_of(5)))
    monkeypatch.undo()
    assert len(run(engine, request(prompt_of(5)))[0][0][0]) == 8


def test_a_failing_scheduler_fails_everybody_and_not_the_previous_step(engine, monkeypatch):
    monkeypatch.setattr(engine.core._scheduler, "schedule", boom)

    async def both():
        one = request(prompt_of(5))
        return await asyncio.gather(
            collect(engine, one), collect(engine, one), return_exceptions=True
        )

    results = asyncio.run(both())
    assert all(isinstance(result, GenerationError) for result in results)
    monkeypatch.undo()
    assert len(run(engine, request(prompt_of(5)))[0][0][0]) == 8


@pytest.mark.parametrize("limits", [{"max_context_tokens": 128}, {"max_context_tokens": 16}])
def test_the_smallest_cache_still_serves(tiny_model_dir, limits):
    with running(tiny_model_dir, max_running_requests=1, **limits) as small:
        tokens, _, _ = run(small, request(prompt_of(10), max_tokens=4))[0]
        assert len(tokens[0]) == 4


def test_a_cache_without_room_is_refused_at_load(tiny_model_dir):
    with pytest.raises(ModelNotSupportedError, match="KV_CACHE_BYTES"):
        Engine.load(Settings(model=tiny_model_dir, device="cpu", kv_cache_bytes=1000), Counting())


def test_high_bits_of_a_seed_count(engine):
    def tokens(seed):
        one = request(prompt_of(20), temperature=2.0, seed=seed, max_tokens=12)
        return run(engine, one)[0][0][0]

    assert tokens(7) == tokens(7) != tokens(7 + 2**32)


def test_a_cancelled_generation_tells_its_reader_and_frees_its_pages(engine):
    async def cancel_after(num_updates):
        got = []
        async with await engine.submit(request(prompt_of(40), max_tokens=3000)) as generation:
            async for _, update in generation:
                got.append(update)
                if len(got) == num_updates:
                    generation.cancel()
                    generation.cancel()  # twice changes nothing
        return got

    before = len(engine.events.abort_reasons)
    got = asyncio.run(cancel_after(3))
    tokens = [token for update in got for token in update.token_ids]
    finish = got[-1].finish
    assert finish.reason is FinishReason.ABORT
    assert finish.num_generated_tokens == len(tokens) >= 3
    assert finish.statistics.phase(Phase.PREFILL).blocks_total > 0
    ((whole, text, _),) = run(engine, request(prompt_of(40), max_tokens=len(tokens)))
    assert whole[0] == tokens
    assert text[0] == "".join(update.text for update in got)
    assert engine.events.abort_reasons[before:] == ["cancelled"]
    wait_until(lambda: engine.status().num_pages_used == 0)


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


def test_a_prompt_of_an_earlier_request_is_reused_and_told(tiny_model_dir):
    one = request(prompt_of(300), max_tokens=4)
    with running(tiny_model_dir, prefix_caching=True) as caching:
        results = [run(caching, one)[0]]
        results.append(run(caching, one)[0])
        results.append(run(caching, dataclasses.replace(one, cache_salt="mine"))[0])
        results.append(run(caching, dataclasses.replace(one, reuses_prefix=False))[0])
        wait_until(lambda: caching.status().num_pages_used == 0)
    assert [finish[0].num_cached_tokens for _, _, finish in results] == [0, 256, 0, 0]
    assert all(tokens == results[0][0] for tokens, _, _ in results)


def test_choices_of_one_request_compute_its_prompt_once(tiny_model_dir):
    one = request(prompt_of(300), n=3, temperature=2.0, seed=11)
    with running(tiny_model_dir) as plain:
        expected, _, _ = run(plain, one)[0]
    with running(tiny_model_dir, prefix_caching=True) as caching:
        tokens, _, finish = run(caching, one)[0]
    assert tokens == expected
    assert sorted(f.num_cached_tokens for f in finish.values()) == [0, 256, 256]


def test_a_queue_of_too_many_tokens_refuses_and_says_when_to_come_back(tiny_model_dir):
    with running(tiny_model_dir, max_running_requests=1, max_waiting_tokens=500) as small:

        async def flood():
            long = request(prompt_of(400), max_tokens=300)
            async with await small.submit(long) as first:
                async for _ in first:
                    break  # it runs, so the queue is empty
                async with await small.submit(request(prompt_of(600))):  # nobody else waits
                    with pytest.raises(QueueFullError, match="tokens of prompts wait") as caught:
                        await small.submit(long)
                    assert 1 <= (caught.value.retry_after_s or 0) <= 120

        asyncio.run(flood())
        wait_until(lambda: small._loop.num_waiting_tokens == 0)


def test_a_request_whose_turn_does_not_come_gets_an_error_that_says_so(tiny_model_dir):
    with running(tiny_model_dir, max_running_requests=1, max_queue_s=0.2) as small:

        async def wait_in_vain():
            async with await small.submit(request(prompt_of(10), max_tokens=3000)) as first:
                async for _ in first:
                    break
                with pytest.raises(QueueTimeoutError, match="Retry later"):
                    await collect(small, request(prompt_of(10)))
                async with await small.submit(request(prompt_of(10))) as late:
                    with pytest.raises(QueueTimeoutError, match="Retry later"):
                        await late.has_begun()

        asyncio.run(wait_in_vain())
        wait_until(lambda: small.status().num_pages_used == 0)
        assert small.events.abort_reasons == ["deadline", "deadline", "client"]


def test_asking_whether_a_generation_has_begun_takes_nothing_of_it(tiny_model_dir):
    with running(tiny_model_dir, max_queue_s=60) as one:

        async def ask():
            tokens = []
            async with await one.submit(request(prompt_of(10), max_tokens=9)) as generation:
                await generation.has_begun()
                await generation.has_begun()
                async for _, update in generation:
                    tokens += update.token_ids
            return tokens

        assert len(asyncio.run(ask())) == 9


@pytest.mark.parametrize("limits", [({}, 0.3), ({"max_request_s": 0.3}, None)])
def test_a_generation_that_takes_too_long_ends_with_what_it_has(tiny_model_dir, limits):
    settings, timeout_s = limits
    with running(tiny_model_dir, **settings) as one:
        slow = request(prompt_of(10), max_tokens=3500)
        tokens, _, finish = run(one, dataclasses.replace(slow, timeout_s=timeout_s))[0]
        assert finish[0].reason is FinishReason.ABORT
        assert 0 < len(tokens[0]) < 3500
        assert finish[0].timing.total_s >= 0.3
        wait_until(lambda: one.status().num_pages_used == 0)


def test_the_urgent_request_runs_before_those_that_came_earlier(tiny_model_dir):
    with running(tiny_model_dir, max_running_requests=1) as small:
        ended = []

        async def follow(name, one):
            await collect(small, one)
            ended.append(name)

        async def compete():
            busy = request(prompt_of(10), max_tokens=400)
            async with await small.submit(busy) as first:
                jobs = [
                    follow(name, dataclasses.replace(request(prompt_of(9)), priority=priority))
                    for name, priority in (("plain", 0), ("late", 5), ("urgent", -3))
                ]
                waiting = [asyncio.ensure_future(job) for job in jobs]
                await asyncio.to_thread(wait_until, lambda: small.status().num_waiting == 3)
                async for _ in first:
                    pass
                await asyncio.gather(*waiting)

        asyncio.run(compete())
        assert ended == ["urgent", "plain", "late"]
