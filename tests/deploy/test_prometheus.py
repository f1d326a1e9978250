"""Rules name metrics that exist; every alert is tested, and told to the operator."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.metrics import Metrics
from tools.dashboard import metric_names
from tools.deploy_files import RULES

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy" / "prometheus"


def rules() -> list[dict[str, Any]]:
    groups = [group for file in RULES for group in yaml.safe_load(file.read_text())["groups"]]
    return [rule for group in groups for rule in group["rules"]]


ALERTS = [rule for rule in rules() if "alert" in rule]
RECORDS = {rule["record"] for rule in rules() if "record" in rule}
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.get("alert", rule.get("record")))
def test_a_rule_names_only_what_exists(rule: dict[str, Any]) -> None:
    names = metric_names(re.sub(r'"[^"]*"', '""', rule["expr"]))
    assert names <= Metrics().labels.keys() | RECORDS


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_an_alert_says_what_it_is_and_where_to_read_on(alert: dict[str, Any]) -> None:
    name = alert["alert"]
    assert alert["annotations"]["summary"].endswith(".")
    assert alert["labels"]["severity"] in {"critical", "warning", "info"}
    assert alert["annotations"]["runbook"] == f"docs/operations.md#{name.lower()}"
    section = OPERATIONS.partition(f"\n#### {name}\n")[2].partition("\n#")[0]
    assert len(section.split()) > 15, f"docs/operations.md has no advice on {name}"


def test_every_section_on_an_alert_has_its_alert() -> None:
    described = set(re.findall(r"^#### (Sparseserve\w+)$", OPERATIONS, re.MULTILINE))
    assert described == {alert["alert"] for alert in ALERTS}


def test_every_alert_has_a_case_that_fires_it() -> None:
    cases = yaml.safe_load((DEPLOY / "rules_test.yml").read_text())["tests"]
    fired = {
        check["alertname"]
        for case in cases
        for check in case["alert_rule_test"]
        if check.get("exp_alerts")
    }
    assert fired == {alert["alert"] for alert in ALERTS}


def test_the_files_that_the_configuration_names_exist() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    assert all((DEPLOY / file).exists() for file in config["rule_files"])
    assert {file.name for file in RULES} == set(config["rule_files"])
