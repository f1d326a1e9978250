"""Two replicas of the built-in model behind Ray Serve's proxy, as ``deploy/ray`` starts them."""

import collections
import concurrent.futures
import contextlib
import json
import os
import signal
import threading

import httpx
import psutil
import pytest

from tests.ops.ray_cluster import MAX_ONGOING, MAX_QUEUED, RayCluster, value, wait

pytestmark = [pytest.mark.ops, pytest.mark.timeout(300)]  # a cluster starts on two slow cores


@pytest.fixture(scope="module")
def cluster():
    running = RayCluster()
    try:
        running.deploy(running.config())
        running.wait_replicas(2)
        yield running
    finally:
        running.close()


def at_once(cluster, count, **fields):
    """Answers to so many equal requests that are sent together."""
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        asked = [pool.submit(cluster.generate, "The captain", **fields) for _ in range(count)]
        return [future.result() for future in asked]


def test_each_request_chooses_its_method(cluster):
    by_query = cluster.generate("The captain", params={"method": "streaming"}, max_tokens=4)
    by_body = cluster.generate("The captain", method="quest", version="v1", max_tokens=4)
    default = cluster.generate("The captain", max_tokens=4)
    answers = [answer.json() for answer in (by_query, by_body, default)]
    assert [a["method"] for a in answers] == ["streaming", "quest", "flash_skip_softmax"]
    assert by_body.headers["X-Sparse-Method"] == "quest"
    assert by_body.headers["X-Sparse-Version"] == "v1"


def test_replicas_get_as_much_processor_as_anybody_else(cluster):
    assert {psutil.Process(pid).nice() for pid in cluster.replicas()} == {0}


def test_refusals_keep_their_shape_on_the_way_through_the_proxy(cluster):
    refused = cluster.generate("The captain", method="nobody")
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "method"
    as_json = {"Content-Type": "application/json"}
    too_large = cluster.client.post("/generate", content=b"x" * (9 * 2**20), headers=as_json)
    assert too_large.status_code == 413


def test_a_request_keeps_its_id_and_is_told_it_once(cluster):
    answer = cluster.client.get("/health/ready", headers={"X-Request-Id": "mine-1"})
    assert answer.headers.get_list("x-request-id") == ["mine-1"]
    unnamed = cluster.client.get("/health/ready")
    assert len(unnamed.headers.get_list("x-request-id")) == 1


def test_a_stream_arrives_piece_by_piece_and_says_what_the_whole_answer_says(cluster):
    whole = cluster.generate("The captain", max_tokens=24).json()
    body = {"prompt": "The captain", "temperature": 0, "max_tokens": 24, "stream": True}
    with cluster.client.stream("POST", "/generate", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert events.pop() == "[DONE]"
    parts = [json.loads(event) for event in events]
    assert len(parts) > 12
    assert "".join(part["text"] for part in parts) == whole["text"]
    assert parts[-1]["sparsity"] == whole["sparsity"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_pages(cluster, stream):
    aborted = cluster.metric("aborted_requests_total", reason="client")
    body = {"prompt": "The captain", "max_tokens": 4000, "ignore_eos": True, "stream": stream}
    with (
        contextlib.suppress(httpx.ReadTimeout),  # of the one that does not stream
        httpx.stream("POST", f"{cluster.url}/generate", json=body, timeout=2.0) as answer,
    ):
        assert answer.status_code == 200
        pieces = answer.iter_bytes()  # kept, or httpx would hang up when it is collected
        next(pieces)
        assert cluster.metric("kv_cache_pages_used") > 0
    wait(lambda: cluster.metric("aborted_requests_total", reason="client") == aborted + 1)
    wait(lambda: cluster.metric("kv_cache_pages_used") == 0)
    assert cluster.metric("running_requests") == 0


def test_what_is_too_much_is_refused_and_told_when_to_come_again(cluster):
    # Long enough for a slow machine: the others are refused while these still run.
    endless = {"prompt": "The captain", "max_tokens": 30_000, "ignore_eos": True, "stream": True}
    room, more = 2 * MAX_ONGOING, 4
    with concurrent.futures.ThreadPoolExecutor(MAX_QUEUED + more) as pool:
        with contextlib.ExitStack() as held:
            for _ in range(room):
                stream = cluster.client.stream("POST", "/generate", json=endless)
                assert held.enter_context(stream).status_code == 200
            asked = [
                pool.submit(cluster.generate, "The captain", max_tokens=4)
                for _ in range(MAX_QUEUED + more)
            ]
            # Ray may refuse one that would soon have found a place, but never takes one too many.
            wait(lambda: sum(future.done() for future in asked) >= more)
            refused = [future.result() for future in asked if future.done()]
            wait(lambda: cluster.metric("running_requests") == room)
        answers = [future.result() for future in asked]
    assert {answer.status_code for answer in refused} == {429}
    assert {answer.headers["retry-after"] for answer in refused} == {"1"}
    codes = collections.Counter(answer.status_code for answer in answers)
    assert set(codes) == {200, 429}
    assert codes[429] >= more


def test_the_metrics_of_the_replicas_add_up_to_what_was_answered(cluster):
    def seen(name, **labels):
        return [value(text, name, **labels) for text in cluster.ready_scrapes()]

    streaming = {"method": "streaming", "version": "v1"}
    names = ["requests", "prompt_tokens", "generated_tokens", "blocks", "blocks_selected"]
    before = {name: seen(f"{name}_total", **streaming) for name in names}
    http_before = cluster.metric("http_requests_total", route="/generate", code="200")
    answers = []
    for length in range(1, 6):  # never more at once than is taken
        answers += at_once(cluster, 4, method="streaming", max_tokens=length * 8, ignore_eos=True)
    answers = [answer.json() for answer in answers]
    told = {
        "requests": len(answers),
        "prompt_tokens": sum(a["usage"]["prompt_tokens"] for a in answers),
        "generated_tokens": sum(a["usage"]["completion_tokens"] for a in answers),
        "blocks": sum(a["sparsity"]["overall"]["blocks_total"] for a in answers),
        "blocks_selected": sum(a["sparsity"]["overall"]["blocks_selected"] for a in answers),
    }
    for name in names:
        after = seen(f"{name}_total", **streaming)
        assert sum(after) - sum(before[name]) == told[name], name
    after = seen("requests_total", **streaming)
    shares = [new - old for new, old in zip(after, before["requests"], strict=True)]
    assert all(share > 0 for share in shares), "one replica had nothing to do"
    http = cluster.metric("http_requests_total", route="/generate", code="200")
    assert http - http_before == len(answers)


def test_one_replicas_metrics_are_never_taken_for_all_of_them(cluster):
    refused = cluster.client.get("/metrics")
    assert refused.status_code == 404
    assert "docs/ray.md" in refused.json()["error"]["message"]
    own = f"http://127.0.0.1:{cluster.metrics_port}"
    assert httpx.get(f"{own}/metrics").headers["content-type"].startswith("text/plain")
    assert httpx.post(f"{own}/generate", json={"prompt": "x"}).status_code == 404


def test_a_killed_replica_is_replaced_while_requests_go_on(cluster):
    victim, survivor = cluster.replicas()
    stop, lost, answered = threading.Event(), [], []

    def ask():
        while not stop.is_set():
            answer = cluster.generate("The captain", max_tokens=40, ignore_eos=True)
            (answered if answer.status_code == 200 else lost).append(answer)

    threads = [threading.Thread(target=ask) for _ in range(2 * MAX_ONGOING)]
    for thread in threads:
        thread.start()
    try:
        wait(lambda: len(answered) >= 8)
        os.kill(victim, signal.SIGKILL)
        wait(lambda: victim not in cluster.replicas())
        cluster.wait_replicas(2)
        after = len(answered)
        wait(lambda: len(answered) >= after + 8)
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert survivor in cluster.replicas()
    # Only what ran on the killed one can be lost; what waited has gone to the other.
    assert len(lost) <= MAX_ONGOING, [answer.text for answer in lost]


def test_a_replica_that_is_taken_away_finishes_what_it_runs(cluster):
    try:
        with concurrent.futures.ThreadPoolExecutor(2 * MAX_ONGOING) as pool:
            fields = {"max_tokens": 500, "ignore_eos": True}
            asked = [
                pool.submit(cluster.generate, "The captain", **fields)
                for _ in range(2 * MAX_ONGOING)
            ]
            wait(lambda: cluster.metric("running_requests") == 2 * MAX_ONGOING)
            cluster.deploy(cluster.config(num_replicas=1))
            assert not any(future.done() for future in asked), "too fast to show anything"
            answers = [future.result() for future in asked]
        assert [answer.status_code for answer in answers] == [200] * len(answers)
        assert {a.json()["usage"]["completion_tokens"] for a in answers} == {500}
        cluster.wait_replicas(1)
    finally:
        cluster.deploy(cluster.config())
    cluster.wait_replicas(2)


def test_replicas_grow_with_the_requests_that_run(cluster):
    scaling = {
        "min_replicas": 1,
        "max_replicas": 2,
        "initial_replicas": 1,
        "target_ongoing_requests": 1,
        "upscale_delay_s": 1,
        "downscale_delay_s": 1,
        "look_back_period_s": 2,
        "metrics_interval_s": 0.5,
    }
    cluster.deploy(cluster.config(num_replicas=None, autoscaling_config=scaling))
    cluster.wait_replicas(1)
    stop = threading.Event()

    def ask():
        while not stop.is_set():
            cluster.generate("The captain", max_tokens=100, ignore_eos=True)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        cluster.wait_replicas(2)
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
