"""What a user of a real server sees: right answers, right statistics, right refusals."""

import concurrent.futures
import json
import secrets
import signal
import threading
import time
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.timeout(300)  # real prompts on two slow cores

SKIP = {"prefill_threshold": 0.5, "decode_threshold": 0.5}


def check_counts(answer):
    for phase in ("prefill", "decode", "overall"):
        counts = answer["sparsity"][phase]
        assert 0 <= counts["blocks_skipped"] <= counts["blocks_selected"] <= counts["blocks_total"]
        kept = counts["blocks_selected"] - counts["blocks_skipped"]
        assert counts["density"] == pytest.approx(kept / max(1, counts["blocks_total"]), abs=1e-9)
        assert counts["sparsity"] == pytest.approx(1 - counts["density"], abs=1e-9)


@pytest.mark.parametrize(
    ("method", "params", "finds_it"),
    [
        ("dense", {}, True),
        ("flash_skip_softmax", {}, True),
        ("flash_skip_softmax", SKIP, True),
        ("streaming", {}, False),  # blind to the middle: that is what it costs
    ],
)
def test_a_planted_number_comes_back_with_true_statistics(
    server, planted, method, params, finds_it
):
    answer = server.generate(
        planted["prompt"], method=method, method_params=params, max_tokens=planted["max_tokens"]
    )
    check_counts(answer)
    assert answer["usage"]["prompt_tokens"] > 9_500
    assert ("4839201" in answer["text"]) == finds_it
    density = answer["sparsity"]["prefill"]["density"]
    if method == "dense":
        assert density == 1
    if params:
        assert answer["sparsity"]["prefill"]["blocks_skipped"] > 0
        assert density < 1
    if method == "streaming":
        assert density < 0.4
        assert answer["sparsity"]["decode"]["kv_bytes_read"] < (
            0.4 * answer["sparsity"]["decode"]["kv_bytes_dense"]
        )


def test_each_request_of_a_mixed_load_gets_what_it_gets_alone(server, planted):
    words = planted["prompt"].split(" ")
    methods: list[dict[str, Any]] = [
        {"method": "dense"},
        {"method": "flash_skip_softmax", "method_params": SKIP},
        {"method": "streaming", "method_params": {"window_blocks": 2}},
    ]
    jobs: list[dict[str, Any]] = [
        {**methods[i % 3], "prompt": " ".join(words[40 * i : 40 * i + 150 * (i % 5 + 1)])}
        for i in range(9)
    ]
    jobs = [{**job, "max_tokens": 12 + i} for i, job in enumerate(jobs)]
    alone = [server.generate(**job) for job in jobs]
    assert len({answer["text"] for answer in alone}) > 5
    with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
        together = list(pool.map(lambda job: server.generate(**job), jobs))
    for one, other, job in zip(alone, together, jobs, strict=True):
        assert one["choices"][0]["token_ids"] == other["choices"][0]["token_ids"]
        assert one["sparsity"] == other["sparsity"]
        assert other["method"] == job["method"]


def test_streamed_text_equals_whole_text(server):
    body = {"prompt": "The old house stood", "max_tokens": 40, "seed": 5, "temperature": 0.9}
    whole = server.client.post("/generate", json=body).json()
    events = []
    with server.client.stream("POST", "/generate", json={**body, "stream": True}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-sparse-method"] == "flash_skip_softmax"
        events = [line[6:] for line in answer.iter_lines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    parts = [json.loads(event) for event in events[:-1]]
    assert "".join(part.get("text", "") for part in parts) == whole["text"]
    ids = [token for part in parts for token in part.get("token_ids", [])]
    assert ids == whole["choices"][0]["token_ids"]
    assert parts[-1]["sparsity"] == whole["sparsity"]
    assert parts[-1]["usage"] == whole["usage"]


def test_a_seed_reproduces_and_no_seed_does_not(server):
    def text(**fields):
        return server.generate("It was", temperature=1, max_tokens=30, **fields)["text"]

    assert text(seed=3) == text(seed=3) != text(seed=4)
    assert text() != text()


BAD = [
    ({"method": "nope"}, {"prompt": "x"}, "method"),
    ({"method": "dense", "version": "v99"}, {"prompt": "x"}, "version"),
    ({}, {"prompt": "x", "method": "streaming", "method_params": {"nope": 1}}, "method_params"),
    ({"method": "dense"}, {"prompt": "x", "method": "streaming"}, "method"),
    ({}, {"prompt": ""}, "prompt"),
    ({}, {}, None),
    ({}, {"prompt": 5}, "prompt"),
    ({}, {"prompt": "x", "max_tokens": "5"}, "max_tokens"),
    ({}, {"prompt": "x", "surprise": 1}, "surprise"),
    ({}, {"prompt": "word " * 60_000}, "prompt"),
]


@pytest.mark.parametrize(("query", "body", "param"), BAD)
def test_a_bad_request_is_refused_and_the_next_one_works(server, query, body, param):
    answer = server.client.post("/generate", params=query, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, 400)
    assert len(answer.content) <= 2048
    if param is not None:
        assert param in str(error["param"])
    assert server.generate("It was", max_tokens=2)["usage"]["completion_tokens"] == 2


def test_broken_json_and_a_body_of_20_mb_are_refused(server):
    headers = {"content-type": "application/json"}
    answer = server.client.post("/generate", content=b'{"prompt": "x"', headers=headers)
    assert answer.status_code == 400
    big = json.dumps({"prompt": "x" * 20_000_000}).encode()
    with httpx.Client(base_url=server.url, timeout=60) as client:
        assert client.post("/generate", content=big, headers=headers).status_code == 413
    assert server.generate("It was", max_tokens=2)["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("long_prompt", [False, True])
def test_a_client_that_leaves_frees_its_pages(server, planted, stream, long_prompt):
    server.wait_metric("running_requests", 0)
    before = server.metric("aborted_requests_total", reason="client")
    prompt = planted["prompt"] if long_prompt else "It was"
    body = {"prompt": prompt, "max_tokens": 4000, "ignore_eos": True, "stream": stream}
    body["cache_salt"] = secrets.token_hex(8)  # the long prompt must not be there already
    is_read = stream and not long_prompt
    timeout = httpx.Timeout(30, read=30 if is_read else 0.7)

    def leave():
        with httpx.Client(base_url=server.url, timeout=timeout) as client:
            if not stream:
                client.post("/generate", json=body)
                return
            with client.stream("POST", "/generate", json=body) as answer:
                for index, _ in enumerate(answer.iter_lines()):
                    if index > 4:
                        return

    if is_read:
        leave()
    else:
        with pytest.raises(httpx.ReadTimeout):
            leave()
    server.wait_metric("aborted_requests_total", before + 1, reason="client")
    server.wait_metric("kv_cache_pages_used", 0)
    assert server.generate("It was", max_tokens=2)["usage"]["completion_tokens"] == 2


def test_metrics_add_up_to_what_the_answers_said(server):
    labels = {"method": "streaming", "version": "v1"}
    names = ("blocks_total", "blocks_selected_total", "blocks_skipped_total")
    before = [server.metric(name, **labels) for name in names]
    tokens_before = server.metric("generated_tokens_total", **labels)
    answers = [
        server.generate("once " * 400, method="streaming", max_tokens=4, method_params=params)
        for params in ({"window_blocks": 1}, {"window_blocks": 2})
    ]
    keys = ("blocks_total", "blocks_selected", "blocks_skipped")
    sums = [sum(answer["sparsity"]["overall"][key] for answer in answers) for key in keys]
    after = [server.metric(name, **labels) for name in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == sums
    generated = sum(answer["usage"]["completion_tokens"] for answer in answers)
    assert server.metric("generated_tokens_total", **labels) - tokens_before == generated


def test_termination_lets_running_requests_finish(start_server):
    server = start_server().wait_ready()
    answers = []

    def ask():
        answers.append(server.generate("It was", max_tokens=150, ignore_eos=True))

    thread = threading.Thread(target=ask)
    thread.start()
    server.wait_metric("running_requests", 1)
    server.process.send_signal(signal.SIGTERM)
    thread.join(60)
    assert answers[0]["usage"]["completion_tokens"] == 150
    assert server.process.wait(30) == 0
    log = server.stop()
    assert "It was" not in log  # no prompt in the log
    assert all(line.startswith("{") for line in log.splitlines() if "request" in line)


def test_while_the_model_loads_only_liveness_answers_200(start_server):
    server = start_server()
    deadline = time.monotonic() + 60
    statuses = set()
    while time.monotonic() < deadline and 200 not in statuses:
        try:
            if server.client.get("/health/live").status_code == 200:
                statuses.add(server.client.get("/health/ready").status_code)
            time.sleep(0.02)
        except httpx.TransportError:
            time.sleep(0.02)
    assert 503 in statuses
    server.wait_ready().stop()


def test_termination_while_the_model_loads_ends_cleanly(start_server):
    server = start_server()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            server.client.get("/health/live")
            break
        except httpx.TransportError:
            time.sleep(0.02)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0


def test_the_beginning_of_a_prompt_is_computed_once_and_changes_nothing(server, planted):
    before = server.metric("cached_prompt_tokens_total")
    salt = {"cache_salt": "test of reuse", "max_tokens": planted["max_tokens"]}
    cut = planted["prompt"].rindex("\n")  # the question, which differs
    first, again = (server.generate(planted["prompt"], **salt) for _ in range(2))
    other = server.generate(planted["prompt"][:cut] + "\nAnd then", **salt)
    cached = [
        answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        for answer in (first, again, other)
    ]
    num_prompt = first["usage"]["prompt_tokens"]
    assert cached[0] == 0
    assert cached[1] == (num_prompt - 1) // 128 * 128
    assert num_prompt - 256 < cached[2] < num_prompt
    assert again["choices"] == first["choices"]
    assert again["sparsity"]["decode"] == first["sparsity"]["decode"]
    assert again["sparsity"]["prefill"]["blocks_total"] < (
        0.05 * first["sparsity"]["prefill"]["blocks_total"]
    )
    assert again["timing"]["prefill_s"] < first["timing"]["prefill_s"]
    alone = server.generate(planted["prompt"][:cut] + "\nAnd then", max_tokens=salt["max_tokens"])
    assert alone["choices"] == other["choices"]
    assert server.metric("cached_prompt_tokens_total") == before + sum(cached)
    streaming = server.generate(planted["prompt"], method="streaming", **salt)
    assert streaming["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_a_request_that_takes_too_long_ends_with_what_it_has(server):
    before = server.metric("aborted_requests_total", reason="deadline")
    answer = server.generate("Once upon a time", max_tokens=10_000, ignore_eos=True, timeout_s=3)
    assert answer["choices"][0]["finish_reason"] == "abort"
    assert 0 < answer["usage"]["completion_tokens"] < 10_000
    assert len(answer["choices"][0]["token_ids"]) == answer["usage"]["completion_tokens"]
    assert server.metric("aborted_requests_total", reason="deadline") == before + 1
    server.wait_metric("kv_cache_pages_used", 0)


def test_a_request_whose_turn_does_not_come_is_told_to_come_back(start_server):
    server = start_server("--max-running-requests", "1", "--max-queue-s", "1.5").wait_ready()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        long = pool.submit(
            server.generate, "Once upon a time", max_tokens=10_000, ignore_eos=True, timeout_s=10
        )
        server.wait_metric("running_requests", 1)
        refused = server.client.post("/generate", json={"prompt": "Once"})
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert "Retry later" in refused.json()["error"]["message"]
        stream = server.client.post("/generate", json={"prompt": "Once", "stream": True})
        assert stream.status_code == 503
        assert long.result()["choices"][0]["finish_reason"] == "abort"
    server.wait_metric("aborted_requests_total", 3, reason="deadline")
    server.wait_metric("kv_cache_pages_used", 0)


def test_an_overload_gives_answers_and_refusals_that_say_when_to_come_back(start_server):
    limits = ("--max-running-requests", "2", "--max-waiting-requests", "100")
    server = start_server(*limits, "--max-waiting-tokens", "3000").wait_ready()
    prompt = "Once upon a time there was a king. " * 100

    def ask(index):
        body = {"prompt": f"{index} {prompt}", "max_tokens": 5, "ignore_eos": True}
        return httpx.post(f"{server.url}/generate", json=body, timeout=120)

    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(ask, range(48)))
    statuses = {answer.status_code for answer in answers}
    assert statuses == {200, 429}
    for answer in answers:
        if answer.status_code == 200:
            assert answer.json()["usage"]["completion_tokens"] == 5
        else:
            assert 1 <= int(answer.headers["retry-after"]) <= 120
            assert "wait" in answer.json()["error"]["message"]
    server.wait_metric("kv_cache_pages_used", 0)
    assert server.metric("waiting_requests") == 0
