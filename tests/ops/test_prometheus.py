"""Prometheus itself reads our rules, and scrapes a real server."""

import json
import subprocess
import time
from pathlib import Path

import httpx
import pytest
import yaml

from tests.e2e.conftest import free_port
from tools.dashboard import dashboard
from tools.deploy_files import RULES

DEPLOY = Path(__file__).parent.parent.parent / "deploy" / "prometheus"
pytestmark = pytest.mark.timeout(300)


def check(promtool, *arguments, **options):
    done = subprocess.run(
        [promtool, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **options,
    )
    return done.returncode, done.stdout + done.stderr


def test_the_configuration_and_its_rules_are_valid(promtool):
    code, output = check(promtool, "check", "config", str(DEPLOY / "prometheus.yml"))
    assert code == 0, output
    code, output = check(promtool, "check", "rules", "--lint-fatal", *map(str, RULES))
    assert code == 0, output


def test_every_alert_fires_when_it_should_and_only_then(promtool):
    code, output = check(promtool, "test", "rules", str(DEPLOY / "rules_test.yml"))
    assert code == 0, output


def test_every_expression_of_the_dashboard_can_be_parsed(promtool, tmp_path):
    expressions = [
        target["expr"].replace("$__rate_interval", "5m").replace("$job", ".+")
        for panel in dashboard()["panels"]
        for target in panel.get("targets", ())
    ]
    rules = [{"record": f"panel:{i}", "expr": e} for i, e in enumerate(expressions)]
    file = tmp_path / "panels.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    code, output = check(promtool, "check", "rules", str(file))
    assert code == 0, output
    assert f"{len(expressions)} rules found" in output


def test_promtool_has_nothing_to_say_but_on_two_names_that_are_given(promtool, ops_server):
    ops_server.generate("It was", max_tokens=2)
    text = ops_server.client.get("/metrics").text
    _, output = check(promtool, "check", "metrics", input=text)
    remarks = [line for line in output.splitlines() if not line.startswith("vllm:")]
    # The API fixes this gauge's name, and vLLM the colon in its own.
    assert remarks == [
        'sparseserve_kv_cache_pages_total non-counter metrics should not have "_total" suffix'
    ]
    colons = [line for line in output.splitlines() if line.startswith("vllm:")]
    assert all("should not contain ':'" in line for line in colons)


class Prometheus:
    """A running Prometheus with our rules that scrapes one server."""

    def __init__(self, binary, folder, target):
        config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
        config["rule_files"] = [str(DEPLOY / name) for name in config["rule_files"]]
        file = folder / "prometheus.yml"
        file.write_text(yaml.safe_dump(config))
        address = f"127.0.0.1:{free_port()}"
        self.url = f"http://{address}"
        self.log = (folder / "log").open("w")
        self.process = subprocess.Popen(
            [
                binary,
                f"--config.file={file}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={address}",
            ],
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )

    def query(self, expression):
        response = httpx.get(f"{self.url}/api/v1/query", params={"query": expression})
        answer = response.raise_for_status().json()
        assert answer["status"] == "success", answer
        return {
            json.dumps(result["metric"], sort_keys=True): float(result["value"][1])
            for result in answer["data"]["result"]
        }

    def wait(self, expression, condition, timeout_s=60):
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                values = self.query(expression)
                if condition(values):
                    return values
            except httpx.HTTPError:  # it starts: nobody listens, then a 503 in plain text
                values = {}
            assert time.monotonic() < deadline, f"{expression}: {values}"
            time.sleep(0.5)

    def stop(self):
        self.process.terminate()
        self.process.wait(30)
        self.log.close()


@pytest.fixture
def scraping(prometheus, ops_server, tmp_path):
    running = Prometheus(prometheus, tmp_path, f"127.0.0.1:{ops_server.port}")
    yield running
    running.stop()


def test_a_real_prometheus_scrapes_a_real_server(scraping, ops_server):
    scraping.wait('up{job="sparseserve"}', lambda values: list(values.values()) == [1])
    before = ops_server.metric("blocks_total", method="streaming")
    for _ in range(4):
        ops_server.generate(
            "once " * 600, method="streaming", max_tokens=4, method_params={"dense_below": 0}
        )
        time.sleep(1.2)  # so that the rate has more than one sample to look at
    total = ops_server.metric("blocks_total", method="streaming")
    assert total > before
    in_prometheus = 'sum(sparseserve_blocks_total{method="streaming"})'
    scraping.wait(in_prometheus, lambda values: list(values.values()) == [total])
    density = scraping.wait('sparseserve:density:ratio_rate5m{method="streaming"}', len)
    assert all(0 < value <= 1 for value in density.values())
    served = 'sum(vllm:request_success_total{finished_reason="length"})'
    ours = 'sum(sparseserve_requests_total{outcome="length"})'
    scraping.wait(f"{served} == {ours}", len)
    assert scraping.query('vllm:kv_cache_usage_perc{engine="0"}')
    alerts = httpx.get(f"{scraping.url}/api/v1/alerts").json()["data"]["alerts"]
    assert [a["labels"]["alertname"] for a in alerts if a["state"] == "firing"] == []
    rules = httpx.get(f"{scraping.url}/api/v1/rules").json()["data"]["groups"]
    assert all(rule["health"] != "err" for group in rules for rule in group["rules"])
