"""Selecting must not make the host wait for the device: what would is caught on a CPU, too."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_methods import get_sparse_method, list_sparse_methods
from tests.sparse_methods import paged

WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal"}
METHODS: list[tuple[str, str | None, dict[str, Any]]] = [
    *(
        (name, version, {})
        for name, versions in list_sparse_methods().items()
        for version in versions
    ),
    ("quest", "v1", {"top_p": None}),
    ("hybrid", "v1", {"prefill": "xattention", "decode": "snapkv"}),
]


class Waits(TorchDispatchMode):
    """Names the operations that read device data on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if name in {"index", "index_put", "index_put_"} else ()
        if name in WAITING or any(i is not None and i.dtype == torch.bool for i in indices):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def found_in(hook: Callable[..., Any], view: Any) -> list[str]:
    waits = Waits()
    with waits:
        hook(view)
    return waits.found


@pytest.mark.parametrize(("name", "version", "knobs"), METHODS)
def test_no_decision_waits_for_the_device(name, version, knobs):
    method = get_sparse_method(name, version)(knobs)
    generator = torch.Generator().manual_seed(0)
    query, keys = (torch.randn(700, heads, 32, generator=generator) for heads in (4, 2))
    prompt = paged.prefill_view(query, keys, start=256)
    assert found_in(method.select_prefill, prompt) == []
    assert found_in(method.score_pages, prompt) == []
    scores = torch.rand(2, 2, 6, generator=generator)
    rows = paged.decode_view(query[-2:], keys, [700, 300], page_scores=scores)
    assert found_in(method.select_decode, rows) == []


def test_what_waits_is_found():
    values = torch.arange(3)
    assert found_in(lambda x: x[values[0]], torch.rand(3, 2)) == ["_local_scalar_dense"]
    assert found_in(lambda x: x[x > 0.5], torch.rand(3)) != []
