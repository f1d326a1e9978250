"""Both oracles: one measure of mass, two rules of how much of it is read."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

import sparse_methods.oracle
from sparse_methods import BlockSelection, InvalidKnobsError, PageSelection
from sparse_methods.methods.oracle_topk_v1 import OracleTopK
from sparse_methods.methods.oracle_topp_v1 import OracleTopP
from sparse_methods.oracle import OracleMethod
from tests.sparse_methods import paged

BLOCK = 16  # tokens


def draw(
    num_tokens: int, num_heads: int = 4, num_kv_heads: int = 2, block: int = BLOCK, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, Hq, 8] and [T, Hkv, 8]: noise around a direction per block, so that masses differ."""
    generator = torch.Generator().manual_seed(seed)

    def rows(num_heads: int) -> torch.Tensor:
        shape = (-(-num_tokens // block), num_heads, 8)
        centres = torch.randn(shape, generator=generator).repeat_interleave(block, 0)[:num_tokens]
        return centres + torch.randn(num_tokens, num_heads, 8, generator=generator)

    return rows(num_heads), rows(num_kv_heads)


def slow_mass(query: torch.Tensor, keys: torch.Tensor, rows: range, kv_head: int) -> list[float]:
    """Attention of rows [T, Hq, D] to the blocks of keys [T, Hkv, D], over a group's heads."""
    mass = [0.0] * (rows[-1] // BLOCK + 1)
    group = query.shape[1] // keys.shape[1]
    for row in rows:
        for head in range(kv_head * group, (kv_head + 1) * group):
            scores = keys[: row + 1, kv_head] @ query[row, head] / math.sqrt(8)
            for key, weight in enumerate(scores.softmax(0).tolist()):
                mass[key // BLOCK] += weight
    return mass


def is_within_share(mass: list[float], kept: set[int], keep_ratio: float) -> bool:
    return len(kept) < round(keep_ratio * len(mass))


def is_below_p(mass: list[float], kept: set[int], p: float) -> bool:
    return sum(mass[block] for block in kept) < p * sum(mass)


@dataclass(frozen=True)
class Oracle:
    """An oracle with its knob, and when it reads one block more, in plain Python."""

    cls: type[OracleMethod]
    knob: str
    value: float
    reads_more: Callable[[list[float], set[int], float], bool]
    golden: list[list[int]]

    def method(self, value: float | None = None) -> OracleMethod:
        return self.cls({self.knob: value or self.value})

    def keep(self, mass: list[float]) -> list[int]:
        """The rule in words: both ends, then the largest while more is to be read."""
        own = len(mass) - 1
        kept = {0, own}
        for block in sorted(range(1, own), key=lambda b: -mass[b]):
            if self.reads_more(mass, kept, self.value):
                kept.add(block)
        return sorted(kept)

    def expected(self, query: torch.Tensor, keys: torch.Tensor) -> list[list[list[int]]]:
        length = query.shape[0]
        tiles = [range(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK)]
        heads = range(keys.shape[1])
        return [[self.keep(slow_mass(query, keys, rows, h)) for h in heads] for rows in tiles]


TOPK = Oracle(OracleTopK, "keep_ratio", 0.4, is_within_share, [[0, 1, 4, 9], [0, 1, 4, 9]])
TOPP = Oracle(OracleTopP, "p", 0.8, is_below_p, [[0, 1, 2, 3, 4, 5, 7, 9], [0, 1, 2, 4, 5, 7, 9]])


@pytest.fixture(params=[TOPK, TOPP], ids=lambda oracle: oracle.cls.registered_name)
def oracle(request):
    return request.param


def listed(selection: BlockSelection | PageSelection) -> list[list[list[int]]]:
    """Blocks by tile, or row, and KV head."""
    return [
        [row[:count] for row, count in zip(rows, counts, strict=True)]
        for rows, counts in zip(selection.indices.tolist(), selection.counts.tolist(), strict=True)
    ]


@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 159, 160, 161])
def test_the_blocks_are_those_of_the_rule_whatever_the_length(oracle, num_tokens):
    query, keys = draw(num_tokens)
    view = paged.prefill_view(query, keys, block_size=BLOCK)
    assert listed(oracle.method().select_prefill(view)) == oracle.expected(query, keys)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (2, 2), (6, 2), (8, 1)])
def test_the_heads_of_a_group_decide_together(oracle, num_heads, num_kv_heads):
    query, keys = draw(100, num_heads, num_kv_heads, seed=1)
    chosen = listed(
        oracle.method().select_prefill(paged.prefill_view(query, keys, block_size=BLOCK))
    )
    assert chosen == oracle.expected(query, keys)
    assert all(len(tile) == num_kv_heads for tile in chosen)


@pytest.mark.parametrize("kv_len", [1, 16, 17, 100, 160])
def test_a_decoded_row_reads_what_the_rule_gives_one_row(oracle, kv_len):
    query, keys = draw(160, seed=6)
    view = paged.decode_view(query[kv_len - 1 : kv_len], keys, [kv_len], page_size=BLOCK)
    rows = range(kv_len - 1, kv_len)
    want = [oracle.keep(slow_mass(query, keys, rows, head)) for head in range(2)]
    assert listed(oracle.method().select_decode(view)) == [want]


def test_a_decoded_row_alone_reads_what_it_reads_in_a_batch(oracle):
    query, keys = draw(160, seed=7)
    kv_lens = [160, 1, 77, 32, 33]
    rows = query[torch.tensor(kv_lens) - 1]
    together = paged.decode_view(rows, keys, kv_lens, page_size=BLOCK)
    alone = [
        paged.decode_view(row[None], keys, [length], page_size=BLOCK)
        for row, length in zip(rows, kv_lens, strict=True)
    ]
    singles = [listed(oracle.method().select_decode(view))[0] for view in alone]
    assert listed(oracle.method().select_decode(together)) == singles


@pytest.mark.parametrize("ends", [(16, 330), (64, 80, 330), (320, 330)])
def test_a_chunk_decides_what_the_whole_prompt_decides(oracle, ends):
    query, keys = draw(330, seed=2)
    whole = listed(
        oracle.method().select_prefill(paged.prefill_view(query, keys, block_size=BLOCK))
    )
    parts, start = [], 0
    for end in ends:
        view = paged.prefill_view(query, keys, start=start, stop=end, block_size=BLOCK)
        parts += listed(oracle.method().select_prefill(view))
        start = end
    assert parts == whole


def test_a_larger_share_reads_more_and_one_reads_everything(oracle):
    view = paged.prefill_view(*draw(320), block_size=BLOCK)
    sums = [
        int(oracle.method(knob).select_prefill(view).counts.sum()) for knob in (1e-9, 0.5, 0.8, 1.0)
    ]
    ends = sum(min(own + 1, 2) for own in range(20)) * 2
    assert sums[0] == ends < sums[1] < sums[2] < sums[3] == sum(range(21)) * 2


@pytest.mark.parametrize("num_queries", [1, 130, 600])
def test_the_mask_keeps_the_blocks_that_serving_reads(oracle, num_queries):
    query, keys = draw(600, 2, 2, block=128, seed=4)
    scores = torch.einsum("qhd,khd->hqk", query[-num_queries:], keys)[None] / math.sqrt(8)
    mask, stats = oracle.method(0.6).calculate_sparsity(scores)
    if num_queries == 1:
        view = paged.decode_view(query[-1:], keys, [600])
        served = listed(oracle.method(0.6).select_decode(view))
    else:
        served = listed(oracle.method(0.6).select_prefill(paged.prefill_view(query, keys)))
    for head in range(2):
        kept = {key // 128 for key in mask[0, head, -1].nonzero().flatten().tolist()}
        assert sorted(kept) == served[-1][head]
    assert 0 < stats["sparse_blocks"] < stats["total_blocks"]


def test_it_is_for_evaluation_only(oracle):
    assert oracle.cls.evaluation_only


@pytest.mark.parametrize("value", [0.0, 1.01])
def test_knobs_have_bounds(oracle, value):
    with pytest.raises(InvalidKnobsError, match=f"'{oracle.knob}'"):
        oracle.cls({oracle.knob: value})


def test_decisions_stay_as_they_were(oracle):
    """A released version never changes what it keeps."""
    view = paged.prefill_view(*draw(150), block_size=BLOCK)
    assert listed(oracle.method().select_prefill(view))[-1] == oracle.golden


def test_the_content_hash_covers_the_measure_of_mass(oracle, monkeypatch):
    before, read = oracle.cls.content_hash(), inspect.getsource

    def edited(module):
        return read(module) + "#" * (module is sparse_methods.oracle)

    monkeypatch.setattr(inspect, "getsource", edited)
    assert oracle.cls.content_hash() != before
