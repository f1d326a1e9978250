"""From observed counts to fits: known curves come back, and what does not suffice is refused."""

import math

import numpy as np
import pytest
from pydantic import ValidationError

from sparse_methods import Phase
from sparse_methods.calibration.artifact import (
    REFERENCE_LENGTH,
    CalibrationArtifact,
    Fit,
    MethodCalibration,
    PhaseCalibration,
    clamp,
)
from sparse_methods.calibration.fit import (
    TRIAL_THRESHOLDS,
    CalibrationError,
    Observation,
    fit_phase,
)

TRUE = Fit(a=0.02, b=19.0, p=0.33, r_squared=1.0, min_sparsity=0.1, max_sparsity=0.9, num_points=20)


def observation(length: int, fits: list[Fit], total: float = 1000.0) -> Observation:
    shares = [[f.sparsity(math.log(t), length) for t in TRIAL_THRESHOLDS] for f in fits]
    skipped = np.asarray(shares) * total
    return Observation(length, skipped, np.full(len(fits), total))


def test_twenty_thresholds_are_tried_from_a_millionth_to_almost_1():
    assert len(TRIAL_THRESHOLDS) == 20
    assert list(TRIAL_THRESHOLDS) == sorted(TRIAL_THRESHOLDS)
    assert (TRIAL_THRESHOLDS[0], TRIAL_THRESHOLDS[-1]) == (1e-6, 0.99)


def test_the_curve_that_made_the_points_is_found():
    fits = fit_phase([observation(length, [TRUE]) for length in (2048, 4096, 16384)])
    found = fits.model
    assert (found.a, found.b, found.p) == pytest.approx((0.02, 19.0, 0.33), rel=1e-3)
    assert found.r_squared == pytest.approx(1.0, abs=1e-6)
    assert 0.1 <= found.min_sparsity < found.max_sparsity <= 0.9


def test_one_length_alone_gives_the_plain_exponential():
    found = fit_phase([observation(REFERENCE_LENGTH, [TRUE])]).model
    assert found.p == 0.0
    assert found.b == pytest.approx(19.0, rel=1e-3)
    scale = math.exp(found.log_threshold(0.4, REFERENCE_LENGTH)) * REFERENCE_LENGTH
    assert scale == pytest.approx(found.a * math.exp(found.b * 0.4))


def test_a_fit_covers_its_layer_and_those_after_it():
    sparser = TRUE.model_copy(update={"a": 0.002})
    lengths = (2048, 4096, 16384)
    fits = fit_phase([observation(length, [TRUE, sparser, sparser]) for length in lengths])
    assert len(fits.layers) == 3
    assert fits.layers[2].a == pytest.approx(0.002, rel=1e-2)
    assert fits.layers[1].a == pytest.approx(0.002, rel=1e-2)
    assert 0.002 < fits.model.a < 0.02


def test_points_outside_of_a_tenth_to_nine_tenths_do_not_count():
    wild = observation(4096, [TRUE])
    shares = wild.skipped / 1000
    is_outside = (shares < 0.1) | (shares > 0.9)
    assert is_outside.any()
    changed = np.where(shares < 0.1, 0.0, wild.skipped)
    other = fit_phase([Observation(4096, changed, wild.total)])
    assert other == fit_phase([wild])
    assert other.model.num_points == int((~is_outside).sum())


def test_too_few_points_are_refused():
    flat = Observation(4096, np.zeros((2, 20)), np.full(2, 10.0))
    with pytest.raises(CalibrationError, match="0 observations lie between"):
        fit_phase([flat])


def test_the_two_directions_of_a_fit_agree():
    for length in (512, 4096, 40_000):
        for sparsity in (0.2, 0.5, 0.8):
            assert TRUE.sparsity(TRUE.log_threshold(sparsity, length), length) == pytest.approx(
                sparsity
            )
    assert TRUE.sparsity(-1000.0, 4096) == 0.0


def test_a_threshold_never_leaves_what_was_tried():
    assert math.exp(clamp(-1000.0)) == pytest.approx(1e-6)
    assert math.exp(clamp(5.0)) == pytest.approx(0.99)
    assert clamp(-1.0) == -1.0


def artifact() -> CalibrationArtifact:
    entry = MethodCalibration(
        method="flash_skip_softmax",
        version="v2",
        block_size=128,
        phases={Phase.PREFILL: PhaseCalibration(layers=(TRUE,))},
    )
    return CalibrationArtifact(
        model="m",
        model_fingerprint="f",
        library_versions={"torch": "2"},
        prompt_lengths=(1024,),
        methods=(entry,),
    )


def test_an_artifact_is_json_and_comes_back():
    one = artifact()
    assert CalibrationArtifact.model_validate_json(one.model_dump_json()) == one


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": 2},
        {"methods": artifact().methods * 2},
        {"surprise": 1},
    ],
)
def test_an_artifact_of_another_shape_is_refused(change):
    with pytest.raises(ValidationError):
        CalibrationArtifact.model_validate({**artifact().model_dump(), **change})


@pytest.mark.parametrize("change", [{"a": 0}, {"b": -1}, {"p": 1.5}, {"a": math.inf}])
def test_a_fit_that_makes_no_sense_is_refused(change):
    with pytest.raises(ValidationError):
        Fit(**{**TRUE.model_dump(), **change})
