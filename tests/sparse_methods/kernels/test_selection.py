"""Every method's decisions with the kernels of selection: those of the eager rules."""

from typing import Any

import pytest
import torch

from sparse_methods import get_sparse_method, list_sparse_methods
from sparse_methods.kernels import selection
from tests.sparse_methods import paged
from tests.sparse_methods.kernels.cases import DEVICE
from tests.sparse_methods.test_host_syncs import found_in

SMALL: dict[str, dict[str, Any]] = {  # knobs at which a short prompt leaves blocks out
    "block_topk": {"keep_ratio": 0.4, "min_blocks": 3},
    "flashprefill": {"alpha": 0.9, "sink_blocks": 1, "window_blocks": 2},
    "xattention": {"tau": 0.6},
    "quest": {"budget_pages": 6, "top_p": 0.7},
    "snapkv": {"budget_pages": 2, "window": 40},
    "streaming": {"sink_blocks": 1, "window_blocks": 2},
    "vertical_slash": {"vertical_blocks": 2, "slash_diagonals": 3, "recent_blocks": 1},
    "flexprefill": {"gamma": 0.6, "min_budget_blocks": 1},
    "predictive_skip": {"threshold": 0.5, "margin": 0.0},
}
METHODS = [
    (name, version, SMALL.get(name, {}))
    for name, versions in list_sparse_methods().items()
    for version in versions
    if name != "hybrid"  # its halves are here
]
NAMES = [f"{name}@{version}" for name, version, _ in METHODS]
BLOCK, TOKENS = 32, 330


def tensors():
    generator = torch.Generator().manual_seed(0)
    query, keys = (2 * torch.randn(TOKENS, heads, 16, generator=generator) for heads in (6, 2))
    scores = torch.rand(3, 2, -(-TOKENS // BLOCK), generator=generator)
    return query, keys, scores


def prompt(start=0, stop=None):
    query, keys, _ = tensors()
    view = paged.prefill_view(query, keys, start=start, stop=stop, block_size=BLOCK)
    return paged.on(view, DEVICE)


def rows():
    query, keys, scores = tensors()
    view = paged.decode_view(
        query[:3], keys, [TOKENS, 100, 33], page_size=BLOCK, page_scores=scores
    )
    return paged.on(view, DEVICE)


def listed(chosen):
    if chosen is None:
        return None
    return [
        [indices[:count] for indices, count in zip(*row, strict=True)]
        for row in zip(chosen.indices.tolist(), chosen.counts.tolist(), strict=True)
    ]


def as_sets(lists):
    return lists and [[sorted(blocks) for blocks in row] for row in lists]


@pytest.fixture
def use(monkeypatch):
    def switch(has_kernels):
        monkeypatch.setattr(selection, "has_kernels", lambda tensor: has_kernels)

    return switch


@pytest.mark.parametrize(("name", "version", "knobs"), METHODS, ids=NAMES)
def test_kernels_decide_as_the_eager_rules_do(name, version, knobs, use):
    method = get_sparse_method(name, version)(knobs)
    for view in (prompt(), prompt(128, 256)):
        use(has_kernels=False)
        expected = listed(method.select_prefill(view))
        use(has_kernels=True)
        assert listed(method.select_prefill(view)) == expected
    use(has_kernels=False)
    expected = as_sets(listed(method.select_decode(rows())))
    use(has_kernels=True)
    assert as_sets(listed(method.select_decode(rows()))) == expected


@pytest.mark.parametrize(("name", "version", "knobs"), METHODS, ids=NAMES)
def test_a_chunk_reads_what_it_reads_in_the_whole_prompt(name, version, knobs, use):
    use(has_kernels=True)
    method = get_sparse_method(name, version)(knobs)
    whole, parts = listed(method.select_prefill(prompt())), []
    for start, stop in ((0, 128), (128, 160), (160, TOKENS)):
        parts += listed(method.select_prefill(prompt(start, stop))) or []
    assert parts == (whole or [])


@pytest.mark.parametrize(("name", "version", "knobs"), METHODS, ids=NAMES)
def test_no_kernel_makes_the_host_wait(name, version, knobs, use):
    use(has_kernels=True)
    method = get_sparse_method(name, version)(knobs)
    assert found_in(method.select_prefill, prompt()) == []
    assert found_in(method.select_decode, rows()) == []


@pytest.mark.parametrize("name", SMALL)
def test_something_is_left_out(name, use):
    """Else nothing above would be compared."""
    use(has_kernels=False)
    method = get_sparse_method(name)(SMALL[name])
    chosen = method.select_prefill(prompt()) or method.select_decode(rows())
    assert chosen is not None
    num_visible = torch.tensor([11, 4, 2]) if chosen.counts.shape[0] == 3 else torch.arange(1, 12)
    assert (chosen.counts.cpu() < num_visible[:, None]).any()
    assert (chosen.counts > 1).any()
