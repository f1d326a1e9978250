"""Specs as they are typed."""

import pytest

from service.evaluation.specs import all_specs, parse_specs
from sparse_methods import SparseMethodError, list_sparse_methods


def test_commas_inside_of_braces_do_not_separate():
    specs = parse_specs(['dense;streaming@v1{"sink_blocks": 2, "window_blocks": 3},dense', "dense"])
    assert [spec.label for spec in specs] == [
        "dense v1",
        "streaming v1 (sink_blocks=2, window_blocks=3)",
        "dense v1",
        "dense v1",
    ]
    assert specs[1].knobs["window_blocks"] == 3
    assert specs[1].knobs["dense_below"] is None  # every knob is kept, also those not given


@pytest.mark.parametrize("text", ["streaming{", "streaming{sink_blocks: 2}"])
def test_knobs_that_are_no_json_are_refused(text):
    with pytest.raises(ValueError, match="are not JSON"):
        parse_specs([text])


@pytest.mark.parametrize("text", ["nothing", "dense@v99", 'streaming{"sink_blocks": 0}'])
def test_what_the_registry_refuses_is_refused(text):
    with pytest.raises(SparseMethodError):
        parse_specs([text])


def test_all_means_every_version_dense_first():
    specs = all_specs()
    assert specs[0].label == "dense v1"
    assert len(specs) == sum(map(len, list_sparse_methods().values()))
