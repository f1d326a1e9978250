"""Flash skip softmax: drop a tile inside the softmax if no row of it can still matter.

Source: NVIDIA ModelOpt, ``attention_sparsity/methods/flash_skip_softmax.py``, commits 9e38041d3
(``threshold``, one number per phase) and 2d7d1ec34 (``thresholds``, a list per phase); the rule is
BLASST, Yuan et al., 2025, arXiv:2512.12087.

This version is the contract to the letter, so its score-level counts keep what is odd in them:
padded query rows keep every block, the causal total assumes square blocks and an aligned prefix,
lambda >= 1 drops everything, sparse_blocks is truncated, and nothing is computed in float32 that
did not come in float32. Served requests are counted by ``statistics`` instead.

Departures: when calibrating, the mask is computed nonetheless, and at serving lambda stays below 1.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, Literal, Self, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch.nn import functional
from typing_extensions import override

from sparse_methods.errors import UnsupportedError
from sparse_methods.method import Knobs as BaseKnobs
from sparse_methods.method import SparseAttentionMethod
from sparse_methods.registry import register_sparse_method
from sparse_methods.views import Phase

_PhaseName = Annotated[str, Field(pattern="^(prefill|decode)$")]
_Fraction = Annotated[float, Field(ge=0, lt=1)]
_Fractions = Annotated[list[_Fraction], Field(min_length=1, max_length=64)]
_DEFAULT_THRESHOLD = {"prefill": 1e-3, "decode": 1e-4}
_DEFAULT_TARGET = 0.5  # the contract's target for a phase that names none
_EXAMPLE_LENGTHS = (1024, 4096, 16384, 65536, 131072)
_LARGEST_BELOW_1 = math.nextafter(1.0, 0.0)


class Fit(BaseModel):
    """A calibrated phase: lambda = a * exp(b * target_sparsity) / length."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    a: float = Field(ge=0, le=1e9, description="Scale of the fit, tokens.")
    b: float = Field(ge=0, le=100, description="Growth of the fit per unit of target sparsity.")

    def scale_factor(self, target: float) -> float:
        """Lambda times the length in tokens at which a fraction ``target`` is skipped."""
        return self.a * math.exp(self.b * target)

    def info(self, target: float) -> dict[str, Any]:
        """Describe the fit as ``get_threshold_info`` does."""
        scale = self.scale_factor(target)
        thresholds = {length: scale / length for length in _EXAMPLE_LENGTHS}
        described = {"target_sparsity": target, "scale_factor": scale}
        return {**self.model_dump(), **described, "example_thresholds": thresholds}


@register_sparse_method("flash_skip_softmax", version="v1")
class FlashSkipSoftmax(SparseAttentionMethod):
    """Skips tiles whose every score lies a factor lambda below the running row maximum.

    Use it to reproduce the decisions of NVIDIA ModelOpt; v2 skips more at the same threshold.

    Attributes:
        thresholds: Lambdas in force; the first decides, the others are only counted.
    """

    source: ClassVar[str] = "arXiv:2512.12087; NVIDIA ModelOpt 9e38041d3"

    class Knobs(BaseKnobs):
        """Thresholds, their calibration and the geometry of the contract."""

        threshold: dict[_PhaseName, _Fraction] = Field(
            _DEFAULT_THRESHOLD,
            description="Lambda per phase, a share of the row's largest weight; 0 skips nothing.",
        )
        thresholds: dict[_PhaseName, _Fractions] | None = Field(
            None, description="Lambdas per phase, instead of threshold; the first decides."
        )
        br: int = Field(128, ge=1, le=4096, description="Query rows of a tile, tokens.")
        bc: int = Field(128, ge=1, le=4096, description="Keys of a tile, tokens.")
        backend: Literal["pytorch"] = Field(
            "pytorch", description="The contract's; the server picks its own kernel."
        )
        is_causal: bool = Field(default=True, description="Whether tiles above the diagonal count.")
        calibration_params: dict[_PhaseName, Fit] | None = Field(
            None, description="Fit per phase; with target_sparse_ratio it replaces the thresholds."
        )
        target_sparse_ratio: dict[_PhaseName, _Fraction] | None = Field(
            None, description="Fraction of tiles to skip, per phase, as the fit predicts it."
        )

        @model_validator(mode="after")
        def _check_one_spelling(self) -> Self:
            if self.thresholds is not None and self.threshold != _DEFAULT_THRESHOLD:
                raise ValueError("give threshold or thresholds, not both")
            return self

    knobs: Knobs

    def __init__(self, method_config: Mapping[str, Any] | BaseKnobs | None = None) -> None:
        super().__init__(method_config)
        self.br, self.bc, self.is_causal = self.knobs.br, self.knobs.bc, self.knobs.is_causal
        self.backend = self.knobs.backend
        self.thresholds = [_DEFAULT_THRESHOLD["prefill"]]
        self._update_thresholds(Phase.PREFILL)
        self._calibration_mode = False
        self._last_stats: dict[str, Any] | None = None

    @property
    @override
    def name(self) -> str:
        return "flash_skip_softmax"

    @property
    def threshold(self) -> float:
        """Lambda in force."""
        return self.thresholds[0]

    @threshold.setter
    def threshold(self, value: float) -> None:
        self.thresholds = [value]

    @property
    def calibration_params(self) -> dict[str, dict[str, float]] | None:
        """Fit per phase; assigning it makes this instance equal to one built with that knob."""
        fits = self.knobs.calibration_params
        return None if fits is None else {phase: fit.model_dump() for phase, fit in fits.items()}

    @calibration_params.setter
    def calibration_params(self, value: Mapping[str, Mapping[str, float]] | None) -> None:
        self._replace_knob("calibration_params", value)

    @property
    def target_sparse_ratio(self) -> dict[str, float] | None:
        """Target per phase; assigning it makes this instance equal to one built with that knob."""
        return self.knobs.target_sparse_ratio

    @target_sparse_ratio.setter
    def target_sparse_ratio(self, value: Mapping[str, float] | None) -> None:
        self._replace_knob("target_sparse_ratio", value)

    @override
    def calculate_sparsity(
        self, attention_scores: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        if attention_scores.dim() != 4:
            raise AssertionError(f"Expected 4D attention scores, got {attention_scores.shape}")
        phase = self._infer_phase(attention_scores)
        if not self._calibration_mode:
            self._update_thresholds(phase)
        sparse_mask, self._last_stats = self.calc_correction_factor_and_p(attention_scores, phase)
        return sparse_mask, self._last_stats

    @override
    def apply_sparsity(
        self, attention_scores: torch.Tensor, sparse_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        return super().apply_sparsity(attention_scores, sparse_mask)

    def calc_correction_factor_and_p(
        self, attn_weights: torch.Tensor, phase: str
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Apply the rule to [B, Hq, Lq, Lk] scores; the names are the contract's.

        Returns:
            Mask of the first threshold in force, and statistics. ``sparsity`` and ``sparse_blocks``
            are numbers if ``threshold`` configured the method, and lists after ``thresholds``.
        """
        batch, num_heads, num_queries, num_keys = attn_weights.shape
        br = 1 if phase == Phase.DECODE else self.br
        blocked, num_rows, num_columns, *padded = self._reshape_to_blocks(attn_weights, br, self.bc)
        block_max = blocked.amax(-1)  # [B, Hq, rows, br, columns]
        running_max = block_max.cummax(-1).values  # inclusive: a block competes with itself
        rises = torch.ones_like(block_max)
        rises[..., 1:] = block_max[..., 1:] > running_max[..., :-1]
        drop = block_max - running_max
        kept = [(drop > t).any(-2) for t in self._log_thresholds(phase, num_keys)]  # [B, Hq, r, c]
        total = num_rows * num_columns
        if self.is_causal and phase != Phase.DECODE:
            total = num_rows * (2 * num_columns - num_rows + 1) // 2
        sparsity = [1.0 - int(k.sum()) / (total * batch * num_heads) for k in kept]
        sparse_blocks = [int(share * total) for share in sparsity]
        is_scalar = self.knobs.thresholds is None and len(kept) == 1
        stats = {
            "correction_factor": (rises.sum() / rises.numel()).item(),
            "sparsity": sparsity[0] if is_scalar else sparsity,
            "phase": str(phase),
            "total_blocks": total,
            "sparse_blocks": sparse_blocks[0] if is_scalar else sparse_blocks,
            "sample_length": num_keys,
        }
        elements = kept[0][:, :, :, None, :, None].expand_as(blocked)
        mask = elements.reshape(batch, num_heads, *padded)
        return mask[:, :, :num_queries, :num_keys], stats

    @override
    def get_threshold_info(self) -> dict[str, Any]:
        fits, targets = self.knobs.calibration_params, self.knobs.target_sparse_ratio
        if fits is None or targets is None:
            return {"type": "static", "value": self._configured()}
        return {
            "type": "dynamic_calibrated",
            "formula": "threshold = a * exp(b * target_sparsity) / seqlen",
            "calibration_params": self.calibration_params,
            "target_sparse_ratio": self.target_sparse_ratio,
            "phases": {p: fit.info(targets.get(p, _DEFAULT_TARGET)) for p, fit in fits.items()},
        }

    def set_calibration_mode(self, enabled: bool) -> None:  # noqa: FBT001 - the contract's
        """While on, the thresholds in force stay as assigned and the context masks nothing."""
        self._calibration_mode = enabled

    @contextmanager
    def get_sparse_context(self, module: Any) -> Iterator[None]:  # noqa: ANN401 - any object will do
        """Make ``functional.softmax`` sparse; its statistics go to ``module._last_stats``."""
        dense_softmax = functional.softmax

        def sparse_softmax(
            input: torch.Tensor,  # noqa: A002 - torch's own name
            dim: int | None = -1,
            _stacklevel: int = 3,
            dtype: torch.dtype | None = None,
        ) -> torch.Tensor:
            sparse_mask, module._last_stats = self.calculate_sparsity(input)  # noqa: SLF001
            scores = input if self._calibration_mode else self.apply_sparsity(input, sparse_mask)
            return dense_softmax(scores, dim, _stacklevel, dtype)

        functional.softmax = sparse_softmax
        try:
            yield
        finally:
            functional.softmax = dense_softmax

    def _infer_phase(self, attention_scores: torch.Tensor) -> str:
        return "decode" if attention_scores.shape[2] == 1 else "prefill"

    def _update_thresholds(self, phase: str) -> None:
        """Put a phase's lambdas in force; a phase without any keeps those of the phase before."""
        value = self._configured().get(phase, self.thresholds)
        self.thresholds = value if isinstance(value, list) else [value]

    def _update_threshold(self, phase: str) -> None:
        self._update_thresholds(phase)

    def _reshape_to_blocks(
        self, tensor: torch.Tensor, br: int, bc: int
    ) -> tuple[torch.Tensor, int, int, int, int]:
        """Return [B, Hq, rows, br, columns, bc], rows, columns, padded Lq and padded Lk."""
        num_queries, num_keys = tensor.shape[2:]
        num_rows, num_columns = math.ceil(num_queries / br), math.ceil(num_keys / bc)
        padded_queries, padded_keys = num_rows * br, num_columns * bc
        padding = (0, padded_keys - num_keys, 0, padded_queries - num_queries)
        if any(padding):
            tensor = functional.pad(tensor, padding, value=torch.finfo(tensor.dtype).min)
        blocked = tensor.reshape(*tensor.shape[:2], num_rows, br, num_columns, bc)
        return blocked, num_rows, num_columns, padded_queries, padded_keys

    def _log_thresholds(self, phase: str, num_keys: int) -> list[float]:
        calibrated = self._calibrated(phase, num_keys)
        values = self.thresholds if calibrated is None else [calibrated]
        return [math.log(value) if value > 0 else -math.inf for value in values]

    @override
    def skip_threshold(self, phase: Phase, kv_len: int) -> float | None:
        threshold = self._calibrated(phase, kv_len)
        if threshold is None:
            configured = self._configured()  # else what a fresh instance has in force
            value = configured.get(phase, configured.get("prefill", _DEFAULT_THRESHOLD["prefill"]))
            threshold = value[0] if isinstance(value, list) else value
        return min(threshold, _LARGEST_BELOW_1) if threshold > 0 else None

    @override
    def check_servable(self, block_size: int) -> None:
        needed = {"br": block_size, "bc": block_size, "is_causal": True}
        for knob, value in needed.items():
            if (given := getattr(self.knobs, knob)) != value:
                raise UnsupportedError(
                    f"Knob {knob!r} of {self.name!r} is {given}; to be served it must be {value}, "
                    f"as attention is causal and a block holds {block_size} tokens."
                )

    def _configured(self) -> dict[str, Any]:
        """Lambda per phase as configured: a number, or a list for the later spelling."""
        if self.knobs.thresholds is None:
            return {**self.knobs.threshold}
        return {phase: list(values) for phase, values in self.knobs.thresholds.items()}

    def _calibrated(self, phase: str, num_keys: int) -> float | None:
        fits, targets = self.knobs.calibration_params, self.knobs.target_sparse_ratio
        if fits is None or targets is None or phase not in fits:
            return None
        target = targets.get(phase, _DEFAULT_TARGET)
        return fits[phase].scale_factor(target) / max(num_keys, 1)

    def _replace_knob(self, knob: str, value: Mapping[str, Any] | None) -> None:
        config = {**self.knobs.model_dump(), knob: value}
        self.knobs = cast("FlashSkipSoftmax.Knobs", self._validate(config))
