"""Sparse attention methods behind NVIDIA ModelOpt's registry API, made servable per request."""

from sparse_methods.errors import (
    InvalidKnobsError,
    SparseMethodError,
    UnknownMethodError,
    UnknownVersionError,
    UnsupportedError,
)
from sparse_methods.method import Fallback, Knobs, SparseAttentionMethod
from sparse_methods.registry import (
    get_sparse_method,
    latest_version,
    list_sparse_methods,
    register_sparse_method,
)
from sparse_methods.views import BlockSelection, DecodeView, PageSelection, Phase, PrefillView

__all__ = [
    "BlockSelection",
    "DecodeView",
    "Fallback",
    "InvalidKnobsError",
    "Knobs",
    "PageSelection",
    "Phase",
    "PrefillView",
    "SparseAttentionMethod",
    "SparseMethodError",
    "UnknownMethodError",
    "UnknownVersionError",
    "UnsupportedError",
    "get_sparse_method",
    "latest_version",
    "list_sparse_methods",
    "register_sparse_method",
]
