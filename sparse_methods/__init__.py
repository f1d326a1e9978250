"""Sparse attention methods behind NVIDIA ModelOpt's registry API, made servable per request."""

from sparse_methods.errors import (
    InvalidKnobsError,
    SparseMethodError,
    UnknownMethodError,
    UnknownVersionError,
    UnsupportedError,
)
from sparse_methods.method import (
    BlockSelection,
    DecodeView,
    Knobs,
    PageSelection,
    Phase,
    PrefillView,
    SparseAttentionMethod,
)
from sparse_methods.registry import (
    get_sparse_method,
    latest_version,
    list_sparse_methods,
    register_sparse_method,
)

__all__ = [
    "BlockSelection",
    "DecodeView",
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
