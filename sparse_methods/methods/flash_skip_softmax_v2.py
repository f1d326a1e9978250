"""Flash skip softmax with the diagonal first: raise the row maximum early, then skip more.

Source: BLASST, Yuan et al., 2025, arXiv:2512.12087, and NVIDIA ModelOpt,
``attention_sparsity/methods/flash_skip_softmax.py``, commit 9e38041d3, whose contract v1 keeps.

Departures from both: a tile visits its own block first, then block 0, then the rest ascending (a
row's largest score is mostly near its own position or at the start, so that going left to right
meets it last and skips little); lambda stays below 1; decisions are taken in float32; only visible
blocks count, per head and at any offset. A target sparsity is not only translated once into a
threshold: each tile corrects its threshold layer by layer from what the layers before skipped.
"""

import math
from collections.abc import Hashable, Mapping
from typing import Any, ClassVar, Self, cast

import torch
from pydantic import Field
from typing_extensions import override

from sparse_methods.block_method import BlockKnobs, BlockMethod, ScoreTiles
from sparse_methods.calibration.artifact import (
    HIGHEST_THRESHOLD,
    LOWEST_THRESHOLD,
    REFERENCE_LENGTH,
    Fit,
    MethodCalibration,
    PhaseCalibration,
    clamp,
)
from sparse_methods.calibration.observe import diagonal_first_order, skip_margins
from sparse_methods.errors import UnsupportedError
from sparse_methods.method import Fallback
from sparse_methods.method import Knobs as BaseKnobs
from sparse_methods.registry import register_sparse_method
from sparse_methods.views import Phase, ThresholdView

_LARGEST_BELOW_1 = math.nextafter(1.0, 0.0)


@register_sparse_method("flash_skip_softmax", version="v2")
class FlashSkipSoftmax(BlockMethod):
    """Skips tiles far below the running row maximum, which the diagonal and first tile set early.

    Use it where quality comes first, or where a set share is to be skipped (``target_sparsity``,
    after a calibration). It computes every score, so it saves less time than a list does.

    Attributes:
        calibration: What serves a target sparsity; None if the model has not been calibrated.
    """

    source: ClassVar[str] = "arXiv:2512.12087; NVIDIA ModelOpt 9e38041d3"
    has_target_sparsity: ClassVar[bool] = True
    # On a CPU it pays off from 4,096 tokens on; but whoever sets a target wants it at any length.
    measured_break_even: ClassVar[int] = 0

    class Knobs(BlockKnobs):
        """A threshold or a target sparsity for each phase."""

        prefill_threshold: float = Field(
            0.1,
            ge=0,
            lt=1,
            description="Lambda of prompt tiles, a share of the largest weight; 0 skips none.",
        )
        decode_threshold: float = Field(
            0.01,
            ge=0,
            lt=1,
            description="Lambda of generated rows, a share of the largest weight; 0 skips none.",
        )
        target_sparsity: float | None = Field(
            None,
            ge=0,
            le=0.95,
            description="Share of the prompt's block pairs to skip, instead of prefill_threshold.",
        )
        decode_target_sparsity: float | None = Field(
            None,
            ge=0,
            le=0.95,
            description="Share of the block pairs of generated rows to skip, likewise.",
        )

    knobs: Knobs

    def __init__(self, method_config: Mapping[str, Any] | BaseKnobs | None = None) -> None:
        super().__init__(method_config)
        self.calibration: MethodCalibration | None = None

    @property
    @override
    def name(self) -> str:
        return "flash_skip_softmax"

    @override
    def with_calibration(self, calibration: MethodCalibration) -> Self:
        of = (calibration.method, calibration.version)
        if of != (self.registered_name, self.registered_version):
            return self
        calibrated = type(self)(self.knobs)
        calibrated.calibration = calibration
        return calibrated

    @override
    def visits_diagonal_first(self, phase: Phase) -> bool:
        return True

    @override
    def keep_from_scores(self, tiles: ScoreTiles) -> torch.Tensor:
        threshold = self.skip_threshold(
            Phase.DECODE if tiles.is_decode else Phase.PREFILL, tiles.num_keys
        )
        order = diagonal_first_order(tiles.tile_blocks, tiles.num_blocks)  # [N, M]
        maxima = tiles.by_block().amax(-1)  # [B, Hq, N, rows, M]
        in_order = maxima.gather(-1, order[:, None].expand_as(maxima))
        margins = skip_margins(in_order)
        log_threshold = -math.inf if threshold is None else math.log(threshold)
        is_kept = torch.empty_like(margins, dtype=torch.bool)
        return is_kept.scatter_(-1, order.expand_as(margins), margins > log_threshold)

    @override
    def skip_threshold(self, phase: Phase, kv_len: int) -> float | None:
        target = self._target(phase)
        if target is None:
            knobs = self.knobs
            is_prefill = phase is Phase.PREFILL
            threshold = knobs.prefill_threshold if is_prefill else knobs.decode_threshold
            return min(threshold, _LARGEST_BELOW_1) if threshold > 0 else None
        fits = self._fits(phase)
        if target == 0 or fits is None:
            return None
        return math.exp(clamp(fits.model.log_threshold(target, kv_len)))

    @override
    def adapts_thresholds(self, phase: Phase) -> bool:
        return bool(self._target(phase)) and self._fits(phase) is not None

    @override
    def adapt_thresholds(self, view: ThresholdView) -> torch.Tensor | None:
        target, fits = self._target(view.phase), self._fits(view.phase)
        if not target or fits is None:
            return None
        kv_lens = view.kv_lens.double()
        density = torch.full_like(kv_lens, 1.0 - target)
        if view.phase is Phase.PREFILL:
            # At one threshold for the whole prompt, late tiles are sparser than early ones.
            base = _clamped(_log_threshold(fits.model, density, kv_lens))
            kv_lens = self._visible_tokens(view)
            density = _tile_density(fits.model, base, kv_lens)
        done, remaining = view.layer, view.num_layers - view.layer
        if done:
            total, selected, skipped = view.blocks.double().unbind(-1)
            computed = (selected - skipped) / total
            density = (density * view.num_layers - computed * done) / remaining
        fit = fits.layers[view.layer]
        if view.phase is Phase.PREFILL:
            density = _prompt_density(fit, density, kv_lens)
        return _clamped(_log_threshold(fit, density, kv_lens)).float()

    @override
    def prompt_regime(self, prompt_len: int) -> Hashable:
        if self._target(Phase.PREFILL):
            return super().prompt_regime(prompt_len)
        return prompt_len < self.break_even(Phase.PREFILL)  # the knob is the same at any length

    @override
    def check_servable(self, block_size: int) -> None:
        for phase in Phase:
            if self._target(phase) is None:
                continue
            knob = "target_sparsity" if phase is Phase.PREFILL else "decode_target_sparsity"
            advice = "Set a threshold instead, or run `sparseserve calibrate` for this model."
            if self._fits(phase) is None:
                raise UnsupportedError(
                    f"Knob {knob!r} of {self.name!r} needs a calibration, and this server has none"
                    f" of {self.registered_version} for the {phase} phase of its model. {advice}"
                )
            calibrated = cast("MethodCalibration", self.calibration).block_size
            if calibrated != block_size:
                raise UnsupportedError(
                    f"Knob {knob!r} of {self.name!r} was calibrated for blocks of {calibrated}"
                    f" tokens, and this server's have {block_size}. {advice}"
                )

    @override
    def fallback_in(
        self, phase: Phase, prompt_len: int, context_len: int | None = None
    ) -> Fallback | None:
        inherited = super().fallback_in(phase, prompt_len, context_len)
        target, fits = self._target(phase), self._fits(phase)
        if inherited is not None or not target or fits is None:
            return inherited
        found = _outside(fits.model, target, prompt_len)
        if found is None:
            return None
        return Fallback(found[0], f"{phase.capitalize()}: {found[1]}", "outside_of_calibration")

    @override
    def get_threshold_info(self) -> dict[str, Any]:
        values = {
            "prefill": self.knobs.prefill_threshold,
            "decode": self.knobs.decode_threshold,
        }
        if self.calibration is None:
            return {"type": "static", "value": values}
        return {
            "type": "dynamic_calibrated",
            "value": {p: v if self._target(Phase(p)) is None else None for p, v in values.items()},
            "formula": (
                "threshold = a * exp(b * (1 - (1 - target_sparsity)"
                f" * (length / {REFERENCE_LENGTH}) ** p)) / length"
            ),
            "phases": {
                str(phase): fits.info(self._target(phase))
                for phase, fits in self.calibration.phases.items()
            },
        }

    def _target(self, phase: Phase) -> float | None:
        knobs = self.knobs
        return knobs.target_sparsity if phase is Phase.PREFILL else knobs.decode_target_sparsity

    def _fits(self, phase: Phase) -> PhaseCalibration | None:
        return None if self.calibration is None else self.calibration.phases.get(phase)

    def _visible_tokens(self, view: ThresholdView) -> torch.Tensor:
        block_size = cast("MethodCalibration", self.calibration).block_size
        return (view.num_blocks * block_size).double()

    @override
    def __eq__(self, other: object) -> bool:
        return super().__eq__(other) and cast("Self", other).calibration == self.calibration

    @override
    def __hash__(self) -> int:
        return super().__hash__()


def _log_threshold(fit: Fit, density: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """[N] ``Fit.log_threshold`` of prompts (or rows) of [N] densities and lengths."""
    at_reference = density * (lengths / REFERENCE_LENGTH) ** fit.p
    return math.log(fit.a) - lengths.log() + fit.b * (1.0 - at_reference)


def _clamped(log_thresholds: torch.Tensor) -> torch.Tensor:
    return log_thresholds.clamp(math.log(LOWEST_THRESHOLD), math.log(HIGHEST_THRESHOLD))


# The fit speaks of a prompt of n tokens, whose blocks grow as n^2: D(n) n^2 of them are kept. Its
# last tile keeps what the last block of tokens added: d(n) = D + n/2 * dD/dn at one threshold. With
# D = u (n0/n)^p and u = 1 - (log(lambda n) - log a) / b, that is (n0/n)^p (u (1 - p/2) - 1/(2b)).


def _tile_density(fit: Fit, log_thresholds: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """[N] density of tiles that see [N] tokens, at these thresholds."""
    at_reference = 1.0 - (log_thresholds + visible.log() - math.log(fit.a)) / fit.b
    density = at_reference * (1.0 - fit.p / 2) - 0.5 / fit.b
    return (density * (REFERENCE_LENGTH / visible) ** fit.p).clamp(0.0, 1.0)


def _prompt_density(fit: Fit, density: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """[N] density of prompts whose last tile, which sees [N] tokens, has this density."""
    power = (visible / REFERENCE_LENGTH) ** fit.p
    return (density * power + 0.5 / fit.b) / (1.0 - fit.p / 2) / power


def _outside(fit: Fit, target: float, length: int) -> tuple[str, str] | None:
    """What a target becomes outside of what was observed, and why; None if it is inside."""
    wanted = fit.log_threshold(target, length)
    allowed = clamp(wanted)
    if wanted != allowed:
        expected = fit.sparsity(allowed, length)
        reason = (
            f"{target} at {length} tokens needs a threshold outside of those tried;"
            f" a sparsity of about {expected:.2f} is expected."
        )
        return f"a threshold near {math.exp(allowed):.2g}", reason
    if not fit.min_sparsity <= target <= fit.max_sparsity:
        observed = f"{fit.min_sparsity:.2f} to {fit.max_sparsity:.2f}"
        return "an extrapolated threshold", f"{target} is outside of the observed {observed}."
    return None
