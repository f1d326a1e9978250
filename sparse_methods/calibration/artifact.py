"""What a calibration leaves behind: fits from sparsity to threshold, and of which model they are.

Departures from NVIDIA ModelOpt's ``scale = a * exp(b * S)``, ``lambda = scale / length``: longer
prompts are sparser at the same scale, so the density 1 - S is first carried over to a reference
length by a fitted power of the length; and there is one fit per layer, see ``PhaseCalibration``.
"""

import math
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sparse_methods.views import Phase

SCHEMA_VERSION: Literal[1] = 1
REFERENCE_LENGTH = 4096  # tokens
LOWEST_THRESHOLD, HIGHEST_THRESHOLD = 1e-6, 0.99  # none outside is ever tried or served
_EXAMPLE_LENGTHS = (4096, 16384, 65536)


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Fit(_Record):
    """lambda = a * exp(b * S') / length, S' = 1 - (1 - S) * (length / REFERENCE_LENGTH) ** p."""

    a: float = Field(gt=0, description="Scale, tokens.")
    b: float = Field(gt=0, le=1000, description="Growth per unit of sparsity.")
    p: float = Field(ge=0, le=1, description="Power of the length by which density falls.")
    r_squared: float = Field(le=1, description="Share of the variance of log(lambda) explained.")
    min_sparsity: float = Field(ge=0, le=1, description="Least sparsity among the points fitted.")
    max_sparsity: float = Field(ge=0, le=1, description="Largest sparsity of them.")
    num_points: int = Field(ge=3)

    def log_threshold(self, sparsity: float, length: int) -> float:
        """Natural log of the lambda at which ``length`` tokens are this sparse, unclamped."""
        density = (1.0 - sparsity) * math.pow(length / REFERENCE_LENGTH, self.p)
        return math.log(self.a / length) + self.b * (1.0 - density)

    def sparsity(self, log_threshold: float, length: int) -> float:
        """What a threshold skips of ``length`` tokens, by the fit; not less than 0."""
        at_reference = (log_threshold - math.log(self.a / length)) / self.b
        density = (1.0 - at_reference) * math.pow(REFERENCE_LENGTH / length, self.p)
        return max(0.0, 1.0 - density)


class PhaseCalibration(_Record):
    """Fits of one phase.

    Attributes:
        layers: Fit l is of the sparsity of layer l and all after it, taken together at one lambda:
            what a request that has computed l layers still has to come. Fit 0 is the model's.
    """

    layers: tuple[Fit, ...] = Field(min_length=1, max_length=1024)

    @property
    def model(self) -> Fit:
        """The fit of all layers together."""
        return self.layers[0]

    def info(self, target: float | None) -> dict[str, Any]:
        """Describe the calibration as ``get_threshold_info`` does."""
        described: dict[str, Any] = {**self.model.model_dump(), "target_sparsity": target}
        if target is not None:
            described["example_thresholds"] = {
                str(length): math.exp(clamp(self.model.log_threshold(target, length)))
                for length in _EXAMPLE_LENGTHS
            }
        return described


class MethodCalibration(_Record):
    """Fits of one method in one version, for one block size in tokens."""

    method: str
    version: str
    block_size: int = Field(ge=1)
    phases: dict[Phase, PhaseCalibration]


class CalibrationArtifact(_Record):
    """The file that a calibration writes.

    Attributes:
        model_fingerprint: Of the weights that were calibrated; others are refused.
        prompt_lengths: Tokens of each prompt that was observed.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    model: str
    model_fingerprint: str
    library_versions: dict[str, str]
    prompt_lengths: tuple[int, ...]
    methods: tuple[MethodCalibration, ...]

    @model_validator(mode="after")
    def _check_unique(self) -> Self:
        names = [(entry.method, entry.version) for entry in self.methods]
        if len(set(names)) != len(names):
            raise ValueError("a method version is calibrated twice")
        return self


def clamp(log_threshold: float) -> float:
    """Bring the log of a threshold into the range that is served."""
    lowest, highest = math.log(LOWEST_THRESHOLD), math.log(HIGHEST_THRESHOLD)
    return min(max(log_threshold, lowest), highest)
