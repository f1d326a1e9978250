"""The Grafana dashboard, described once; ``tools/deploy_files.py`` writes it.

Panels name metrics through ``_metric`` only, which knows no metric or label that does not exist.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from service.metrics import Metrics

_PREFIX = "sparseserve_"
_EVERYWHERE = ("job", "instance")  # labels that Prometheus adds
_KNOWN = Metrics().labels
_WIDTH, _HEIGHT, _COLUMNS = 8, 8, 3
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True)
class Panel:
    """A graph: expressions by their legends."""

    title: str
    unit: str
    queries: dict[str, str]
    text: str = ""


def _metric(name: str, by: Iterable[str] = (), **where: str) -> str:
    """A selector of a metric that exists, by labels that it has."""
    labels = _KNOWN[_PREFIX + name]
    unknown = {*by, *where} - {*labels, *_EVERYWHERE}
    if unknown:
        raise KeyError(f"{name} has no label {', '.join(sorted(unknown))}")
    filters = {"job": "$job", **where}
    if "method" in labels:
        filters["method"] = "$method"
    matchers = ", ".join(f'{label}=~"{value}"' for label, value in filters.items())
    return f"{_PREFIX}{name}{{{matchers}}}"


def _rate(name: str, *by: str, **where: str) -> str:
    grouped = f" by ({', '.join(by)})" if by else ""
    return f"sum{grouped} (rate({_metric(name, by, **where)}[$__rate_interval]))"


def _gauge(name: str, *by: str) -> str:
    grouped = f" by ({', '.join(by)})" if by else ""
    return f"sum{grouped} ({_metric(name, by)})"


def _quantile(quantile: float, name: str, *by: str) -> str:
    return f"histogram_quantile({quantile}, {_rate(name + '_bucket', *by, 'le')})"


def _quantiles(name: str) -> dict[str, str]:
    return {f"p{round(q * 100)}": _quantile(q, name) for q in (0.5, 0.9, 0.99)}


def _density(*by: str, **where: str) -> str:
    selected, skipped, total = (
        _rate(f"blocks{part}_total", *by, **where) for part in ("_selected", "_skipped", "")
    )
    return f"({selected} - {skipped}) / ({total} > 0)"


def _legend(*labels: str) -> str:
    return " ".join(f"{{{{{label}}}}}" for label in labels)


METHOD = ("method", "version")

ROWS: dict[str, list[Panel]] = {
    "Traffic": [
        Panel(
            "Generations ended",
            "reqps",
            {_legend("outcome"): _rate("requests_total", "outcome")},
        ),
        Panel(
            "Generations by method",
            "reqps",
            {_legend(*METHOD): _rate("requests_total", *METHOD)},
        ),
        Panel("HTTP answers", "reqps", {_legend("code"): _rate("http_requests_total", "code")}),
        Panel(
            "Tokens",
            "short",
            {
                "prompt": _rate("prompt_tokens_total"),
                "reused": _rate("cached_prompt_tokens_total"),
                "generated": _rate("generated_tokens_total"),
            },
            "Per second. Reused prompt tokens were not computed again.",
        ),
        Panel(
            "Errors and aborts",
            "reqps",
            {
                "failed steps or generations": _rate("engine_errors_total"),
                "aborted: " + _legend("reason"): _rate("aborted_requests_total", "reason"),
            },
        ),
        Panel("Prompt length", "short", _quantiles("prompt_length_tokens"), "Tokens."),
    ],
    "Latency": [
        Panel("Time to first token", "s", _quantiles("time_to_first_token_seconds")),
        Panel(
            "Time to first token by method, p90",
            "s",
            {_legend(*METHOD): _quantile(0.9, "time_to_first_token_seconds", *METHOD)},
        ),
        Panel("Between tokens", "s", _quantiles("inter_token_latency_seconds")),
        Panel("Whole request", "s", _quantiles("request_duration_seconds")),
        Panel("In the queue", "s", _quantiles("request_queue_seconds")),
    ],
    "Sparsity": [
        Panel(
            "Density of prompts",
            "percentunit",
            {_legend(*METHOD): _density(*METHOD, phase="prefill")},
            "Share of the visible block pairs that were computed: a rate over a rate.",
        ),
        Panel(
            "Density of generated tokens",
            "percentunit",
            {_legend(*METHOD): _density(*METHOD, phase="decode")},
        ),
        Panel(
            "Keys and values read in decoding",
            "percentunit",
            {"of dense": f"{_rate('kv_bytes_read_total')} / ({_rate('kv_bytes_dense_total')} > 0)"},
        ),
        Panel(
            "Density of a request, median",
            "percentunit",
            {_legend(*METHOD, "phase"): _quantile(0.5, "request_density", *METHOD, "phase")},
        ),
        Panel(
            "Fallbacks to dense",
            "reqps",
            {_legend(*METHOD, "reason"): _rate("method_fallbacks_total", *METHOD, "reason")},
            "Generations too short for their method to pay.",
        ),
        Panel(
            "Replicas by code of a method",
            "short",
            {
                _legend(*METHOD, "hash"): "count by (method, version, hash)"
                f" ({_metric('method_info', (*METHOD, 'hash'))})"
            },
            "Two hashes of one version outside of a rollout are a fault.",
        ),
    ],
    "Engine": [
        Panel(
            "Running and waiting",
            "short",
            {"running": _gauge("running_requests"), "waiting": _gauge("waiting_requests")},
        ),
        Panel(
            "KV pages in use",
            "percentunit",
            {
                _legend("instance"): f"{_metric('kv_cache_pages_used')}"
                f" / {_metric('kv_cache_pages_total')}"
            },
        ),
        Panel("Preemptions", "reqps", {"per second": _rate("preemptions_total")}),
        Panel(
            "Length of a step, p90",
            "s",
            {_legend("phase"): _quantile(0.9, "engine_step_seconds", "phase")},
        ),
        Panel("Tokens of a step", "short", _quantiles("engine_step_tokens")),
        Panel(
            "What runs",
            "short",
            {
                _legend("version", "model", "device", "attention"): "count by"
                " (version, model, device, attention)"
                f" ({_metric('build_info', ('version', 'model', 'device', 'attention'))})"
            },
        ),
    ],
}


def dashboard() -> dict[str, Any]:
    """The Grafana dashboard, as its API and its provisioning take it."""
    panels: list[dict[str, Any]] = []
    top = 0
    for row, contents in ROWS.items():
        panels.append(_row(len(panels) + 1, row, top))
        for index, panel in enumerate(contents):
            place = {
                "x": index % _COLUMNS * _WIDTH,
                "y": top + 1 + index // _COLUMNS * _HEIGHT,
                "w": _WIDTH,
                "h": _HEIGHT,
            }
            panels.append(_panel(len(panels) + 1, panel, place))
        top += 1 + -(-len(contents) // _COLUMNS) * _HEIGHT
    return {
        "uid": "sparseserve",
        "title": "sparseserve",
        "tags": ["sparseserve"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": _variables()},
        "panels": panels,
    }


def metric_names(expression: str) -> set[str]:
    """Metrics and recorded series that a PromQL expression names."""
    return set(re.findall(r"\bsparseserve[_:][a-z0-9_:]+", expression))


def _row(number: int, title: str, top: int) -> dict[str, Any]:
    place = {"x": 0, "y": top, "w": _WIDTH * _COLUMNS, "h": 1}
    return {"id": number, "type": "row", "title": title, "gridPos": place, "collapsed": False}


def _panel(number: int, panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + index), "expr": expr, "legendFormat": legend, "range": True}
        for index, (legend, expr) in enumerate(panel.queries.items())
    ]
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.text,
        "datasource": _SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {"tooltip": {"mode": "multi", "sort": "desc"}},
        "targets": targets,
    }


def _variables() -> list[dict[str, Any]]:
    queries = {
        "job": f"label_values({_PREFIX}running_requests, job)",
        "method": f'label_values({_PREFIX}method_info{{job=~"$job"}}, method)',
    }
    source = {"name": "datasource", "type": "datasource", "query": "prometheus"}
    return [source] + [
        {
            "name": name,
            "type": "query",
            "datasource": _SOURCE,
            "query": {"query": query, "refId": name},
            "refresh": 2,
            "includeAll": True,
            "multi": True,
            "current": {"text": "All", "value": "$__all"},
        }
        for name, query in queries.items()
    ]
