"""The contract of a sparse attention method.

The score-level half (``name``, ``calculate_sparsity``, ``apply_sparsity``, ``get_threshold_info``)
is NVIDIA ModelOpt's (commit 9e38041d3). The serving half (``select_*``, ``skip_threshold``) says
which blocks of keys a served request reads; both halves keep the same blocks on aligned inputs.
``views`` holds what a method may look at, and the shape legend.
"""

import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from typing_extensions import override

from sparse_methods.calibration.artifact import MethodCalibration
from sparse_methods.errors import InvalidKnobsError
from sparse_methods.views import (
    BlockSelection,
    DecodeView,
    PageSelection,
    Phase,
    PrefillView,
    ThresholdView,
)


class Knobs(BaseModel):
    """What a client may set on a method; each has a default, bounds, a unit and a description."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


_Knobs = Knobs  # inside a method's class body, Knobs is that method's own


@dataclass(frozen=True)
class Fallback:
    """What ran instead of what was asked for, and why.

    Attributes:
        to: What ran, in words for the client.
        reason: Why, in words for the client.
        cause: Why, as a label that counts: one of few.
    """

    to: str
    reason: str
    cause: str = "below_break_even"


class SparseAttentionMethod(ABC):
    """A sparse attention method with its knobs: a value, equal to every other with equal knobs.

    Attributes:
        knobs: The resolved knobs.
        registered_name: Name in the registry; set by ``register_sparse_method``.
        registered_version: Version in the registry; set by ``register_sparse_method``.
        phases: Phases in which the method can leave blocks out.
        source: Publication or code the rule comes from.
        uses_summaries: Whether its views must hold page summaries.
        selects_per_layer: Whether its selection may differ from layer to layer; if not, it is asked
            once per step.
        evaluation_only: Whether it costs more than dense attention, and exists to be compared with.
        has_target_sparsity: Whether its own thresholds can be calibrated to a target sparsity.
        tensor_parallel_safe: Whether what it decides for a KV head does not depend on the others,
            so that ranks which hold some heads each decide as one that holds all of them. What a
            ``ThresholdView`` counts is of all heads in any case.
    """

    Knobs: ClassVar[type[_Knobs]] = _Knobs
    registered_name: ClassVar[str] = ""
    registered_version: ClassVar[str] = ""
    phases: ClassVar[tuple[Phase, ...]] = (Phase.PREFILL, Phase.DECODE)
    source: ClassVar[str] = ""
    uses_summaries: ClassVar[bool] = False
    selects_per_layer: ClassVar[bool] = True
    evaluation_only: ClassVar[bool] = False
    has_target_sparsity: ClassVar[bool] = False
    tensor_parallel_safe: ClassVar[bool] = True

    def __init__(self, method_config: Mapping[str, Any] | _Knobs | None = None) -> None:
        self.knobs = self._validate(method_config)

    @property
    @abstractmethod
    def name(self) -> str:
        """Name of the method in the registry."""

    @abstractmethod
    def calculate_sparsity(
        self, attention_scores: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Decide on materialised scores which elements stay.

        Args:
            attention_scores: [B, Hq, Lq, Lk] scores before the softmax, causal mask included.

        Returns:
            A boolean mask of the same shape, True where kept, and the method's statistics.
        """

    @abstractmethod
    def apply_sparsity(
        self, attention_scores: torch.Tensor, sparse_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the scores with every element that is not kept at the dtype's lowest value."""
        if sparse_mask is None:
            sparse_mask, _ = self.calculate_sparsity(attention_scores)
        lowest = torch.finfo(attention_scores.dtype).min
        return attention_scores.masked_fill(~sparse_mask, lowest)

    def get_threshold_info(self) -> dict[str, Any]:
        """Describe the threshold: ``type`` (static, dynamic, dynamic_calibrated, none), value."""
        return {"type": "none", "value": None}

    def select_prefill(self, view: PrefillView) -> BlockSelection | None:  # noqa: ARG002 - a hook
        """Choose the blocks each query tile reads; None reads all of them."""
        return None

    def select_decode(self, view: DecodeView) -> PageSelection | None:  # noqa: ARG002 - a hook
        """Choose the pages each decode row reads; None reads all of them."""
        return None

    def score_pages(self, view: PrefillView) -> torch.Tensor | None:  # noqa: ARG002 - a hook
        """Evidence that the prompt leaves for its decoding: ``DecodeView.page_scores``.

        Returns:
            [Hkv, M] float32, added up over the chunks of the prompt; None if this chunk has none.
        """
        return None

    def skip_threshold(self, phase: Phase, kv_len: int) -> float | None:  # noqa: ARG002 - a hook
        """Lambda in (0, 1) below which a tile is dropped inside the softmax; None drops nothing.

        Args:
            phase: Phase of the query tile.
            kv_len: Keys of the whole prompt (prefill) or visible to the row (decode), in tokens.
        """
        return None

    def adapt_thresholds(self, view: ThresholdView) -> torch.Tensor | None:  # noqa: ARG002 - a hook
        """[N] log of lambda for this layer, instead of ``skip_threshold``; None keeps that."""
        return None

    def adapts_thresholds(self, phase: Phase) -> bool:  # noqa: ARG002 - a hook
        """Whether ``adapt_thresholds`` may answer; where it may not, no layer prepares to ask."""
        return type(self).adapt_thresholds is not SparseAttentionMethod.adapt_thresholds

    def with_calibration(self, calibration: MethodCalibration) -> Self:  # noqa: ARG002 - a hook
        """The same method bound to fits for the model that is served, if they are of it."""
        return self

    def visits_diagonal_first(self, phase: Phase) -> bool:  # noqa: ARG002 - a hook
        """Whether tiles visit their own block, then the first, then the rest in order.

        Otherwise they visit blocks in ascending order. Lists have their own order.
        """
        return False

    def break_even(self, phase: Phase) -> int:  # noqa: ARG002 - a hook
        """Fewest tokens for which the phase does not run dense: prompt length, or keys of a row."""
        return 0

    def prompt_regime(self, prompt_len: int) -> Hashable:
        """What a prompt's length decides about its tiles; equal answers may share computed pages.

        Prompts of one method that begin with the same tokens have the same keys and values there
        if this is equal. A method must override it if its prompt tiles go by the prompt's length in
        another way than through ``break_even``, ``skip_threshold`` and ``adapt_thresholds``.
        """
        if Phase.PREFILL not in self.phases or prompt_len < self.break_even(Phase.PREFILL):
            return None
        adapts = type(self).adapt_thresholds is not SparseAttentionMethod.adapt_thresholds
        return self.skip_threshold(Phase.PREFILL, prompt_len), prompt_len if adapts else None

    def num_independent_rows(self, prompt_len: int) -> int:
        """Leading rows of a prompt of which nothing but keys and values is needed later on.

        The rows behind them are computed for every request, as what they leave (page scores) is
        its own. A method that scores pages of some rows only says so here.
        """
        scores = type(self).score_pages is not SparseAttentionMethod.score_pages
        return 0 if scores else prompt_len

    def fallback(self, prompt_len: int, context_len: int | None = None) -> Fallback | None:
        """What a request gets instead of the method, if any: in the first phase that has such.

        Args:
            prompt_len: Tokens of its prompt.
            context_len: Keys that its last generated row saw, by which the decode phase goes: a
                method may come into force in the midst of a generation. Unset: as many as the
                prompt.
        """
        found = (self.fallback_in(phase, prompt_len, context_len) for phase in self.phases)
        return next(filter(None, found), None)

    def fallback_in(
        self, phase: Phase, prompt_len: int, context_len: int | None = None
    ) -> Fallback | None:
        """What one of its phases gets instead of the method, if any; else as ``fallback``."""
        has, tokens = "prompt has", prompt_len
        if phase is Phase.DECODE and context_len is not None:
            has, tokens = "context grew to", context_len
        length = self.break_even(phase)
        if tokens >= length:
            return None
        reason = (
            f"The {has} {tokens} tokens; {self.name!r} pays off from {length} on. "
            "Set the knob 'dense_below' to 0 to force it."
        )
        return Fallback("dense", reason)

    def check_servable(self, block_size: int) -> None:  # noqa: B027 - a hook
        """Raise UnsupportedError if the knobs cannot be served with this block size (tokens)."""

    def splits_over_ranks(self) -> bool:
        """Whether it can be served where every rank holds some of the heads."""
        return self.tensor_parallel_safe

    @override
    def __getstate__(self) -> dict[str, Any]:
        # Strings hash differently in every process, and methods do travel between processes.
        return {name: value for name, value in vars(self).items() if name != "_hash"}

    @classmethod
    def description(cls) -> str:
        """First line of the class docstring."""
        return (inspect.getdoc(cls) or "").partition("\n")[0]

    @classmethod
    def content_hash(cls) -> str:
        """Short SHA-256 of the method's source files: two servers with one hash decide alike."""
        modules = dict.fromkeys(inspect.getmodule(base) for base in cls.__mro__)
        ours = [m for m in modules if m and m.__name__.startswith(("sparse_methods.", "tests."))]
        source = "".join(map(inspect.getsource, ours))
        return hashlib.sha256(source.encode()).hexdigest()[:12]

    @classmethod
    def _validate(cls, config: Mapping[str, Any] | _Knobs | None) -> _Knobs:
        if isinstance(config, _Knobs):
            config = config.model_dump()
        try:
            return cls.Knobs.model_validate(dict(config or {}))
        except ValidationError as error:
            raise cls._knob_error(error) from None

    @classmethod
    def _knob_error(cls, error: ValidationError) -> InvalidKnobsError:
        first = error.errors(include_url=False, include_input=False)[0]
        path = ".".join(str(part) for part in first["loc"])[:64]
        known = sorted(cls.Knobs.model_fields)
        label = cls.registered_name or cls.__name__
        if first["type"] == "extra_forbidden":
            message = f"Method {label!r} has no knob {path!r}. Known knobs: {known}."
        else:
            where = f"knob {path!r} of method" if path else "knobs of method"
            message = f"Invalid {where} {label!r}: {first['msg']}. Known knobs: {known}."
        return InvalidKnobsError(message, knob=path)

    @override
    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.knobs == self.knobs

    @override
    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:  # an engine step asks for it once per row
        return hash((type(self), self.knobs.model_dump_json()))

    @override
    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.knobs!r})"
