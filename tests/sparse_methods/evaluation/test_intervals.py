"""Intervals against published and hand-made values."""

import pytest

from sparse_methods.evaluation.intervals import mean, proportion


@pytest.mark.parametrize(
    ("num_right", "count", "low", "high"),
    [
        # Brown, Cai and DasGupta (2001) and statsmodels' proportion_confint(method="wilson").
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (39, 40, 0.8712, 0.9956),
    ],
)
def test_a_proportion_has_wilsons_interval(num_right, count, low, high):
    estimate = proportion(num_right, count)
    assert estimate.value == num_right / count
    assert estimate.low == pytest.approx(low, abs=1e-4)
    assert estimate.high == pytest.approx(high, abs=1e-4)


def test_a_mean_has_students_interval():
    estimate = mean([1.0, 2.0, 3.0, 4.0])
    half = 3.182446 * 1.290994 / 2  # t(0.975, 3) * s / sqrt(4)
    assert estimate.value == 2.5
    assert estimate.low == pytest.approx(2.5 - half, abs=1e-5)
    assert estimate.high == pytest.approx(2.5 + half, abs=1e-5)


def test_one_sample_has_no_interval():
    estimate = mean([3.0])
    assert (estimate.value, estimate.low, estimate.high) == (3.0, None, None)


def test_nothing_is_no_proportion():
    with pytest.raises(ValueError, match="nothing"):
        proportion(0, 0)
