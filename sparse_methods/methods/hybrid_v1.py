"""Hybrid: one method while the prompt is read, another while tokens are generated.

Source: none of its own; each half is a method of the registry and cites its own. That the phases
want different methods is what Nawrot et al., "The Sparse Frontier", 2025, arXiv:2504.17768, find.

Departures: none; every decision of a phase is the named method's, to the letter.
"""

from collections.abc import Hashable, Mapping
from typing import Any, ClassVar, Self, cast

import torch
from pydantic import Field
from typing_extensions import override

from sparse_methods.calibration.artifact import MethodCalibration
from sparse_methods.errors import InvalidKnobsError, UnknownMethodError, UnknownVersionError
from sparse_methods.method import Fallback, SparseAttentionMethod
from sparse_methods.method import Knobs as BaseKnobs
from sparse_methods.registry import get_sparse_method, list_sparse_methods, register_sparse_method
from sparse_methods.views import (
    BlockSelection,
    DecodeView,
    PageSelection,
    Phase,
    PrefillView,
    ThresholdView,
)

_NAME = "hybrid"


@register_sparse_method(_NAME, version="v1")
class Hybrid(SparseAttentionMethod):
    """Runs the prompt through one method and the generation through another.

    Use it where the phases want different methods, such as a threshold for the prompt and ``quest``
    for the generation.

    Attributes:
        halves: The method in force in each phase.
    """

    source: ClassVar[str] = "arXiv:2504.17768"
    uses_summaries: ClassVar[bool] = True  # some method of either half may

    class Knobs(BaseKnobs):
        """Which methods, in which version, with which knobs."""

        prefill: str = Field(
            "xattention", max_length=64, description="Name of the method of the prompt."
        )
        prefill_version: str | None = Field(
            None, max_length=64, description="Its version; unset takes the latest."
        )
        prefill_params: dict[str, Any] = Field({}, description="Its knobs.")
        decode: str = Field(
            "quest", max_length=64, description="Name of the method of the generated tokens."
        )
        decode_version: str | None = Field(
            None, max_length=64, description="Its version; unset takes the latest."
        )
        decode_params: dict[str, Any] = Field({}, description="Its knobs.")

    knobs: Knobs

    def __init__(self, method_config: Mapping[str, Any] | BaseKnobs | None = None) -> None:
        super().__init__(method_config)
        knobs = self.knobs
        prefill = _build(Phase.PREFILL, knobs.prefill, knobs.prefill_version, knobs.prefill_params)
        decode = _build(Phase.DECODE, knobs.decode, knobs.decode_version, knobs.decode_params)
        self.halves = {Phase.PREFILL: prefill, Phase.DECODE: decode}

    @property
    @override
    def name(self) -> str:
        return _NAME

    @override
    def calculate_sparsity(
        self, attention_scores: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        phase = Phase.DECODE if attention_scores.shape[-2] == 1 else Phase.PREFILL
        return self.halves[phase].calculate_sparsity(attention_scores)

    @override
    def apply_sparsity(
        self, attention_scores: torch.Tensor, sparse_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        return super().apply_sparsity(attention_scores, sparse_mask)

    @override
    def get_threshold_info(self) -> dict[str, Any]:
        halves = {phase.value: half.get_threshold_info() for phase, half in self.halves.items()}
        types = {info["type"] for info in halves.values()} - {"none"}
        return {"type": types.pop() if len(types) == 1 else "none", "value": None, **halves}

    @override
    def select_prefill(self, view: PrefillView) -> BlockSelection | None:
        return self.halves[Phase.PREFILL].select_prefill(view)

    @override
    def select_decode(self, view: DecodeView) -> PageSelection | None:
        return self.halves[Phase.DECODE].select_decode(view)

    @override
    def score_pages(self, view: PrefillView) -> torch.Tensor | None:
        return self.halves[Phase.DECODE].score_pages(view)

    @override
    def skip_threshold(self, phase: Phase, kv_len: int) -> float | None:
        return self.halves[phase].skip_threshold(phase, kv_len)

    @override
    def adapt_thresholds(self, view: ThresholdView) -> torch.Tensor | None:
        return self.halves[view.phase].adapt_thresholds(view)

    @override
    def with_calibration(self, calibration: MethodCalibration) -> Self:
        """The same method with each half bound to the fits, if they are of that half."""
        calibrated = type(self)(self.knobs)
        calibrated.halves = {
            phase: half.with_calibration(calibration) if _is_of(calibration, half) else half
            for phase, half in self.halves.items()
        }
        return calibrated

    @override
    def visits_diagonal_first(self, phase: Phase) -> bool:
        return self.halves[phase].visits_diagonal_first(phase)

    @override
    def break_even(self, phase: Phase) -> int:
        return self.halves[phase].break_even(phase)

    @override
    def prompt_regime(self, prompt_len: int) -> Hashable:
        return self.halves[Phase.PREFILL].prompt_regime(prompt_len)

    @override
    def num_independent_rows(self, prompt_len: int) -> int:
        return self.halves[Phase.DECODE].num_independent_rows(prompt_len)

    @override
    def fallback(self, prompt_len: int, context_len: int | None = None) -> Fallback | None:
        halves = {
            phase: half.fallback_in(phase, prompt_len, context_len)
            for phase, half in self.halves.items()
            if phase in half.phases
        }
        found = {phase: fallback for phase, fallback in halves.items() if fallback is not None}
        if not found:
            return None
        reasons = [  # in a hybrid, a half's knobs lie one level deeper
            f"{phase}: " + fallback.reason.replace("knob '", f"knob '{phase}_params.")
            for phase, fallback in found.items()
        ]
        targets = dict.fromkeys(fallback.to for fallback in found.values())
        [cause, *_] = (fallback.cause for fallback in found.values())
        return Fallback(", ".join(targets), " ".join(reasons), cause)

    @override
    def splits_over_ranks(self) -> bool:
        return all(half.splits_over_ranks() for half in self.halves.values())

    @override
    def check_servable(self, block_size: int) -> None:
        for half in self.halves.values():
            half.check_servable(block_size)

    @override
    def __eq__(self, other: object) -> bool:
        return super().__eq__(other) and cast("Self", other).halves == self.halves

    @override
    def __hash__(self) -> int:
        return hash((type(self), *self.halves.values()))  # equal knobs of a half differ in order


def _build(
    phase: Phase, name: str, version: str | None, params: Mapping[str, Any]
) -> SparseAttentionMethod:
    """The method of one half; errors name the knob of the hybrid at fault."""
    try:
        cls = get_sparse_method(name, version)
    except UnknownMethodError as error:
        raise InvalidKnobsError(str(error), knob=phase.value) from None
    except UnknownVersionError as error:
        raise InvalidKnobsError(str(error), knob=f"{phase}_version") from None
    if not _can_serve(cls, phase):
        names = [n for n in list_sparse_methods() if _can_serve(get_sparse_method(n), phase)]
        raise InvalidKnobsError(
            f"{name!r} cannot be the {phase} method of {_NAME!r}. Methods that can: {names}.",
            knob=phase.value,
        )
    try:
        return cls(params)
    except InvalidKnobsError as error:
        knob = f"{phase}_params.{error.knob}".removesuffix(".")
        raise InvalidKnobsError(f"{phase}_params: {error}", knob=knob) from None


def _can_serve(cls: type[SparseAttentionMethod], phase: Phase) -> bool:
    """Dense attention, which declares no phase, can be either half."""
    is_of_phase = not cls.phases or phase in cls.phases
    return is_of_phase and not cls.evaluation_only and cls.registered_name != _NAME


def _is_of(calibration: MethodCalibration, method: SparseAttentionMethod) -> bool:
    of = (calibration.method, calibration.version)
    return of == (method.registered_name, method.registered_version)
