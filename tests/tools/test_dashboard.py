"""No panel names a metric or a label that does not exist."""

import re

import pytest

from service.metrics import Metrics
from tools import dashboard as described
from tools.dashboard import dashboard, metric_names

PANELS = [panel for panel in dashboard()["panels"] if panel["type"] == "timeseries"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]
QUERIES = [v["query"]["query"] for v in dashboard()["templating"]["list"] if v["type"] == "query"]


@pytest.mark.parametrize("expression", [*EXPRESSIONS, *QUERIES])
def test_every_metric_of_an_expression_exists_and_has_its_labels(expression: str) -> None:
    known = Metrics().labels
    names = metric_names(expression)
    assert names
    assert names <= known.keys()
    everywhere = {"job", "instance"}
    labels = {label for name in names for label in known[name]} | everywhere
    used = set(re.findall(r'(\w+)=~?"', expression))
    for group in re.findall(r"by \(([^)]*)\)", expression):
        used |= {label.strip() for label in group.split(",")}
    assert used <= labels


def test_every_metric_is_on_the_dashboard() -> None:
    shown = set().union(*map(metric_names, EXPRESSIONS))
    families = {re.sub("_(bucket|sum|count)$", "", name) for name in Metrics().labels}
    assert families == {re.sub("_(bucket|sum|count)$", "", name) for name in shown}


def test_an_unknown_metric_or_label_is_refused_when_the_panel_is_described() -> None:
    with pytest.raises(KeyError, match="nope"):
        described._rate("nope_total")
    with pytest.raises(KeyError, match="engine_errors_total has no label method"):
        described._rate("engine_errors_total", "method")


def test_no_two_panels_share_an_id_or_a_place() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
