"""The contract of a sparse attention method.

The score-level half (``name``, ``calculate_sparsity``, ``apply_sparsity``, ``get_threshold_info``)
is NVIDIA ModelOpt's (commit 9e38041d3). The serving half (``select_*``, ``skip_threshold``) says
which blocks of keys a served request reads; both halves keep the same blocks on aligned inputs.

Shape legend: B batch, T packed query rows, N query tiles, R rows of a decode step, C capacity of a
list, Hq query heads, Hkv key/value heads, D head dimension. A *block* is a tile of sparsity, a
*page* a unit of KV storage; the engine makes one page hold exactly one block of keys.
"""

import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from typing_extensions import override

from sparse_methods.errors import InvalidKnobsError


class Phase(StrEnum):
    """Which half of a generation a query row belongs to."""

    PREFILL = "prefill"
    DECODE = "decode"


class Knobs(BaseModel):
    """What a client may set on a method; each has a default, bounds, a unit and a description."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


_Knobs = Knobs  # inside a method's class body, Knobs is that method's own


@dataclass(frozen=True)
class PrefillView:
    """What a method may look at when it selects blocks for the query tiles of one layer.

    Attributes:
        query: [T, Hq, D] query rows of these tiles, after RoPE, tile after tile.
        tile_offsets: [N + 1] int32, first row of each tile in ``query``.
        tile_blocks: [N] int32, number of the block the tile lies in (its diagonal block).
        num_kv_heads: Hkv; the query heads of a group share a list.
        block_size: Rows of a full tile and keys of a block, in tokens.
        max_blocks: Most blocks any tile of this view can see: max(tile_blocks) + 1.
        layer: Index of the attention layer.
    """

    query: torch.Tensor
    tile_offsets: torch.Tensor
    tile_blocks: torch.Tensor
    num_kv_heads: int
    block_size: int
    max_blocks: int
    layer: int


@dataclass(frozen=True)
class DecodeView:
    """What a method may look at when it selects pages for single query rows of one layer.

    Attributes:
        query: [R, Hq, D] one query row per request, after RoPE.
        kv_lens: [R] int32, keys visible to the row, its own included.
        num_kv_heads: Hkv; the query heads of a group share a list.
        page_size: Keys of a page, in tokens.
        max_pages: Most pages any row of this view can see.
        layer: Index of the attention layer.
    """

    query: torch.Tensor
    kv_lens: torch.Tensor
    num_kv_heads: int
    page_size: int
    max_pages: int
    layer: int


@dataclass(frozen=True)
class BlockSelection:
    """Blocks of keys each query tile reads, in visiting order.

    Attributes:
        indices: [N, Hkv, C] int32, logical block numbers; entries beyond the count are ignored.
        counts: [N, Hkv] int32, entries in use.
    """

    indices: torch.Tensor
    counts: torch.Tensor


@dataclass(frozen=True)
class PageSelection:
    """Logical pages each decode row reads, in visiting order.

    Attributes:
        indices: [R, Hkv, C] int32, logical page numbers; entries beyond the count are ignored.
        counts: [R, Hkv] int32, entries in use.
    """

    indices: torch.Tensor
    counts: torch.Tensor


class SparseAttentionMethod(ABC):
    """A sparse attention method with its knobs: a value, equal to every other with equal knobs.

    Attributes:
        knobs: The resolved knobs.
        registered_name: Name in the registry; set by ``register_sparse_method``.
        registered_version: Version in the registry; set by ``register_sparse_method``.
        phases: Phases in which the method can leave blocks out.
        source: Publication or code the rule comes from.
    """

    Knobs: ClassVar[type[_Knobs]] = _Knobs
    registered_name: ClassVar[str] = ""
    registered_version: ClassVar[str] = ""
    phases: ClassVar[tuple[Phase, ...]] = (Phase.PREFILL, Phase.DECODE)
    source: ClassVar[str] = ""
    implementations: ClassVar[tuple[str, ...]] = ("reference",)

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

    def get_threshold_info(self) -> dict[str, Any]:
        """Describe the threshold: ``type`` (static, dynamic, dynamic_calibrated, none), value."""
        return {"type": "none", "value": None}

    def select_prefill(self, view: PrefillView) -> BlockSelection | None:  # noqa: ARG002 - a hook
        """Choose the blocks each query tile reads; None reads all of them."""
        return None

    def select_decode(self, view: DecodeView) -> PageSelection | None:  # noqa: ARG002 - a hook
        """Choose the pages each decode row reads; None reads all of them."""
        return None

    def skip_threshold(self, phase: Phase, kv_len: int) -> float | None:  # noqa: ARG002 - a hook
        """Lambda in (0, 1) below which a tile is dropped inside the softmax; None drops nothing.

        Args:
            phase: Phase of the query tile.
            kv_len: Keys of the whole prompt (prefill) or visible to the row (decode), in tokens.
        """
        return None

    def check_servable(self, block_size: int) -> None:  # noqa: B027 - a hook
        """Raise UnsupportedError if the knobs cannot be served with this block size (tokens)."""

    @classmethod
    def description(cls) -> str:
        """First line of the class docstring."""
        return (inspect.getdoc(cls) or "").partition("\n")[0]

    @classmethod
    def content_hash(cls) -> str:
        """Short SHA-256 of the method's source file: two servers with one hash decide alike."""
        source = inspect.getsource(inspect.getmodule(cls) or cls)
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
        return hash((type(self), self.knobs.model_dump_json()))

    @override
    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.knobs!r})"
