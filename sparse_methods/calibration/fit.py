"""Turn observed counts into fits from sparsity to threshold.

Source: NVIDIA ModelOpt, ``attention_sparsity/calibration``, commit 9e38041d3: ``curve_fit`` of
log(lambda * length) against sparsity, on the points between 0.1 and 0.9. ``artifact`` names the
departures.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import curve_fit

from sparse_methods.calibration.artifact import (
    HIGHEST_THRESHOLD,
    LOWEST_THRESHOLD,
    REFERENCE_LENGTH,
    Fit,
    PhaseCalibration,
)

TRIAL_THRESHOLDS: tuple[float, ...] = (
    LOWEST_THRESHOLD,
    *(1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.02, 0.03, 0.05, 0.07),
    *(0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9),
    HIGHEST_THRESHOLD,
)
_MIN_POINTS = 3
_LOWEST, _HIGHEST = 0.1, 0.9  # sparsities of the points that are fitted
_Array = npt.NDArray[np.float64]


class CalibrationError(ValueError):
    """The observations do not determine a fit; the message says what to change."""


@dataclass(frozen=True)
class Observation:
    """What each trial threshold skipped of one prompt in one phase.

    Attributes:
        length: Tokens that thresholds go by: of the prompt, or visible to the decoded rows.
        skipped: [layers, trials] block pairs.
        total: [layers] visible block pairs.
    """

    length: int
    skipped: _Array
    total: _Array


def fit_phase(observations: Sequence[Observation]) -> PhaseCalibration:
    """Fit the layers of a phase; fit l covers layer l and all after it.

    Raises:
        CalibrationError: Fewer than 3 points of a layer lie between 0.1 and 0.9.
    """
    num_layers = len(observations[0].total)
    return PhaseCalibration(layers=tuple(_fit_from(observations, la) for la in range(num_layers)))


def _fit_from(observations: Sequence[Observation], layer: int) -> Fit:
    sparsities = [o.skipped[layer:].sum(0) / o.total[layer:].sum() for o in observations]
    lengths = [np.full(len(TRIAL_THRESHOLDS), float(o.length)) for o in observations]
    thresholds = [np.asarray(TRIAL_THRESHOLDS)] * len(observations)
    sparsity, length, threshold = map(np.concatenate, (sparsities, lengths, thresholds))
    is_used = (sparsity >= _LOWEST) & (sparsity <= _HIGHEST)
    if is_used.sum() < _MIN_POINTS:
        raise CalibrationError(
            f"Of layer {layer} and those after it, {is_used.sum()} observations lie between"
            f" {_LOWEST} and {_HIGHEST} sparsity; {_MIN_POINTS} are needed. Take longer prompts."
        )
    return fit_points(sparsity[is_used], length[is_used], threshold[is_used])


def fit_points(sparsity: _Array, length: _Array, threshold: _Array) -> Fit:
    """Fit one curve to [n] points; with one length alone the density's power is 0."""
    log_scale = np.log(threshold * length)
    has_lengths = length.min() < length.max()

    def curve(_: object, log_a: float, b: float, p: float = 0.0) -> _Array:
        density = (1.0 - sparsity) * (length / REFERENCE_LENGTH) ** p
        return np.asarray(log_a + b * (1.0 - density))

    start, highest = ([0.0, 10.0, 0.3], [25.0, 1000.0, 1.0])
    used = 3 if has_lengths else 2
    bounds = ([-100.0, 1e-3, 0.0][:used], highest[:used])
    found, _ = curve_fit(curve, sparsity, log_scale, p0=start[:used], bounds=bounds)
    residual = log_scale - curve(None, *found)
    spread = log_scale - log_scale.mean()
    return Fit(
        a=float(np.exp(found[0])),
        b=float(found[1]),
        p=float(found[2]) if has_lengths else 0.0,
        r_squared=float(1.0 - (residual**2).sum() / (spread**2).sum()),
        min_sparsity=float(sparsity.min()),
        max_sparsity=float(sparsity.max()),
        num_points=len(sparsity),
    )
