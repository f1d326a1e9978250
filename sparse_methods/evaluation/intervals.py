"""Estimates with 95 % confidence intervals.

Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference",
J. Amer. Statist. Assoc. 22 (1927); Student's t for means.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

_LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A value with the interval that holds the true one with 95 % confidence.

    Attributes:
        low: Lower end; None if one sample does not tell.
        high: Upper end; likewise.
        count: Samples that the value comes from.
    """

    value: float
    low: float | None
    high: float | None
    count: int


def proportion(num_right: int, count: int) -> Estimate:
    """Share of right answers, with Wilson's score interval.

    Raises:
        ValueError: There are no answers.
    """
    if count < 1:
        raise ValueError("a proportion of nothing")
    z = float(stats.norm.ppf((1 + _LEVEL) / 2))
    share = num_right / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    spread = math.sqrt(share * (1 - share) / count + z * z / (4 * count**2))
    half = z * spread / (1 + z * z / count)
    return Estimate(share, max(0.0, centre - half), min(1.0, centre + half), count)


def mean(values: Sequence[float]) -> Estimate:
    """Mean of independent samples, with Student's t interval."""
    middle = statistics.fmean(values)
    if len(values) < 2:
        return Estimate(middle, None, None, len(values))
    error = statistics.stdev(values) / math.sqrt(len(values))
    half = float(stats.t.ppf((1 + _LEVEL) / 2, len(values) - 1)) * error
    return Estimate(middle, middle - half, middle + half, len(values))
