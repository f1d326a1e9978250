"""What the server makes of the contract: thresholds by length, refusals, bounds of knobs."""

import math

import pytest
import torch

from sparse_methods import InvalidKnobsError, Phase, UnsupportedError
from sparse_methods.methods.flash_skip_softmax_v1 import FlashSkipSoftmax
from tests.sparse_methods.methods.flash_skip_scores import SCALAR, gaussian


@pytest.mark.parametrize(
    ("config", "prefill", "decode"),
    [
        ({}, 1e-3, 1e-4),
        (SCALAR, 1e-3, 1e-5),
        ({"thresholds": {"prefill": [0.3, 0.1], "decode": [0.2]}}, 0.3, 0.2),
        ({"threshold": {"prefill": 0.0, "decode": 0.5}}, None, 0.5),
        ({"threshold": {"decode": 0.5}}, 1e-3, 0.5),
        ({"threshold": {"prefill": 0.5}}, 0.5, 0.5),
        ({"thresholds": {"prefill": [0.5]}}, 0.5, 0.5),
    ],
)
def test_a_static_threshold_is_served_as_it_is(config, prefill, decode):
    method = FlashSkipSoftmax(config)
    method.calculate_sparsity(torch.zeros(1, 1, 1, 4))  # what came before does not matter
    assert method.skip_threshold(Phase.PREFILL, 4096) == prefill
    assert method.skip_threshold(Phase.DECODE, 4096) == decode


def test_a_calibrated_threshold_is_served_by_length_and_stays_below_1():
    method = FlashSkipSoftmax(
        {
            "calibration_params": {"prefill": {"a": 8.0, "b": 9.0}},
            "target_sparse_ratio": {"prefill": 0.5},
        }
    )
    scale = 8.0 * math.exp(4.5)
    assert method.skip_threshold(Phase.PREFILL, 10_000) == scale / 10_000
    assert method.skip_threshold(Phase.PREFILL, 512) == math.nextafter(1.0, 0.0)
    assert method.skip_threshold(Phase.PREFILL, 0) == math.nextafter(1.0, 0.0)
    assert method.skip_threshold(Phase.DECODE, 512) == 1e-4


def test_a_fit_of_scale_zero_skips_nothing():
    method = FlashSkipSoftmax(
        {
            "calibration_params": {"decode": {"a": 0.0, "b": 9.0}},
            "target_sparse_ratio": {"decode": 0.5},
        }
    )
    assert method.skip_threshold(Phase.DECODE, 512) is None
    mask, _ = method.calculate_sparsity(gaussian(1, 1, 1, 512) * 50)
    assert mask.all()


def test_a_fit_without_a_target_changes_nothing():
    config = {"calibration_params": {"prefill": {"a": 8.0, "b": 9.0}}}
    assert FlashSkipSoftmax(config).skip_threshold(Phase.PREFILL, 100_000) == 1e-3
    assert FlashSkipSoftmax(config).get_threshold_info()["type"] == "static"


def test_assigning_a_calibration_equals_configuring_it():
    params, target = {"prefill": {"a": 8.0, "b": 9.0}}, {"prefill": 0.5}
    configured = FlashSkipSoftmax({"calibration_params": params, "target_sparse_ratio": target})
    assigned = FlashSkipSoftmax()
    assert assigned.calibration_params is None
    assert assigned.target_sparse_ratio is None
    assert assigned != configured
    assigned.calibration_params, assigned.target_sparse_ratio = params, target
    assert (assigned.calibration_params, assigned.target_sparse_ratio) == (params, target)
    assert assigned == configured
    assert hash(assigned) == hash(configured)
    assigned.calibration_params = assigned.target_sparse_ratio = None
    assert assigned == FlashSkipSoftmax()


@pytest.mark.parametrize(
    ("config", "block_size", "message"),
    [
        ({"br": 64}, 128, "'br' .* is 64; to be served it must be 128"),
        ({"bc": 256}, 128, "'bc' .* is 256; to be served it must be 128"),
        ({}, 64, "'br' .* is 128; to be served it must be 64"),
        ({"is_causal": False}, 128, "'is_causal' .* is False; to be served it must be True"),
    ],
)
def test_what_cannot_be_served_is_refused_by_knob(config, block_size, message):
    with pytest.raises(UnsupportedError, match=message):
        FlashSkipSoftmax(config).check_servable(block_size)


def test_the_defaults_are_served_with_blocks_of_128():
    FlashSkipSoftmax().check_servable(128)
    FlashSkipSoftmax({"br": 64, "bc": 64}).check_servable(64)


@pytest.mark.parametrize(
    "config",
    [
        {"threshold": {"prefill": 1.0}},
        {"threshold": {"prefill": -0.1}},
        {"threshold": {"prefill": math.nan}},
        {"threshold": {"training": 0.1}},
        {"thresholds": {"prefill": []}},
        {"thresholds": {"prefill": [0.1] * 65}},
        {"threshold": {"prefill": 0.1}, "thresholds": {"prefill": [0.1]}},
        {"br": 0},
        {"bc": 4097},
        {"backend": "triton"},
        {"calibration_params": {"prefill": {"a": -1.0, "b": 1.0}}},
        {"calibration_params": {"prefill": {"a": 1.0, "b": 1.0, "c": 1.0}}},
        {"target_sparse_ratio": {"prefill": 1.0}},
    ],
)
def test_knobs_out_of_bounds_are_refused(config):
    with pytest.raises(InvalidKnobsError):
        FlashSkipSoftmax(config)
