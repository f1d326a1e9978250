"""Writes what in deploy/ is generated: the Grafana dashboard, and the rules as a PrometheusRule.

``python -m tools.deploy_files`` writes the files; a test compares them with what this would write.
"""

import json
from pathlib import Path
from typing import Any

import yaml

from tools.dashboard import dashboard

DEPLOY = Path(__file__).parent.parent / "deploy"
DASHBOARD = DEPLOY / "grafana/dashboards/sparseserve.json"
PROMETHEUS_RULE = DEPLOY / "kubernetes/components/monitoring/prometheusrule.yaml"
RULES = (DEPLOY / "prometheus/records.yml", DEPLOY / "prometheus/alerts.yml")


def prometheus_rule() -> dict[str, Any]:
    """The rules of deploy/prometheus for the Prometheus operator."""
    groups = [group for file in RULES for group in yaml.safe_load(file.read_text())["groups"]]
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "sparseserve"},
        "spec": {"groups": groups},
    }


def generated() -> dict[Path, str]:
    """Every generated file with its content."""
    rule = yaml.safe_dump(prometheus_rule(), sort_keys=False, width=100)
    return {
        DASHBOARD: json.dumps(dashboard(), indent=1) + "\n",
        PROMETHEUS_RULE: f"# Written by `python -m tools.deploy_files`.\n{rule}",
    }


if __name__ == "__main__":
    for path, content in generated().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        print(path.relative_to(DEPLOY.parent))
