import math

import pytest
import torch

from sparse_methods import BlockSelection, InvalidKnobsError, UnsupportedError
from sparse_methods.methods.xattention_v1 import XAttention
from tests.sparse_methods import paged

BLOCK, STRIDE = 16, 4  # tokens


def draw(
    num_tokens: int, num_heads: int = 4, num_kv_heads: int = 2, block: int = BLOCK, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, Hq, 8] and [T, Hkv, 8]: noise around a direction per block, so that masses differ."""
    generator = torch.Generator().manual_seed(seed)

    def rows(num_heads: int) -> torch.Tensor:
        shape = (-(-num_tokens // block), num_heads, 8)
        centres = torch.randn(shape, generator=generator).repeat_interleave(block, 0)[:num_tokens]
        return 1.5 * centres + torch.randn(num_tokens, num_heads, 8, generator=generator)

    return rows(num_heads), rows(num_kv_heads)


def slow_mass(
    query: torch.Tensor, keys: torch.Tensor, tile: int, stride: int = STRIDE
) -> list[float]:
    """The estimate in words, of one head with [T, D] queries and keys."""
    mass = [0.0] * (tile + 1)
    num_rows = query.shape[0]
    for group in range(tile * BLOCK, min((tile + 1) * BLOCK, num_rows), stride):
        cells = []
        for other in range(0, group + stride, stride):
            pairs = [(group + i, other + stride - 1 - i) for i in range(stride)]
            seen = [(row, key) for row, key in pairs if row < num_rows and key <= row]
            products = [float(query[row] @ keys[key]) / math.sqrt(8) for row, key in seen]
            cells.append(math.exp(sum(products) / len(products)) if products else 0.0)
        for number, cell in enumerate(cells):
            mass[number * stride // BLOCK] += cell / (sum(cells) or 1.0)
    return mass


def slow_keep(mass: list[float], tau: float) -> list[int]:
    """The rule in words: both ends, then the largest until tau is held."""
    own = len(mass) - 1
    kept = {0, own}
    for block in sorted(range(1, own), key=lambda b: -mass[b]):
        if sum(mass[b] for b in kept) < tau * sum(mass):
            kept.add(block)
    return sorted(kept)


def expected(query: torch.Tensor, keys: torch.Tensor, tau: float) -> list[list[list[int]]]:
    group = query.shape[1] // keys.shape[1]
    tiles = []
    for tile in range(-(-query.shape[0] // BLOCK)):
        heads = []
        for kv_head in range(keys.shape[1]):
            masses = [
                slow_mass(query[:, kv_head * group + g], keys[:, kv_head], tile)
                for g in range(group)
            ]
            mean = [sum(column) / group for column in zip(*masses, strict=True)]
            heads.append(slow_keep(mean, tau))
        tiles.append(heads)
    return tiles


def listed(selection: BlockSelection) -> list[list[list[int]]]:
    """Blocks by tile and KV head."""
    return [
        [row[:count] for row, count in zip(rows, counts, strict=True)]
        for rows, counts in zip(selection.indices.tolist(), selection.counts.tolist(), strict=True)
    ]


def method(tau: float = 0.8, stride: int = STRIDE) -> XAttention:
    return XAttention({"tau": tau, "stride": stride})


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 15, 16, 17, 159, 160, 161, 162, 163, 170])
def test_the_blocks_are_those_of_the_rule_whatever_the_length(num_tokens):
    query, keys = draw(num_tokens)
    view = paged.prefill_view(query, keys, block_size=BLOCK)
    assert listed(method().select_prefill(view)) == expected(query, keys, 0.8)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (2, 2), (6, 2), (8, 1)])
def test_the_heads_of_a_group_decide_together(num_heads, num_kv_heads):
    query, keys = draw(200, num_heads, num_kv_heads, seed=1)
    chosen = listed(method().select_prefill(paged.prefill_view(query, keys, block_size=BLOCK)))
    assert chosen == expected(query, keys, 0.8)
    assert all(len(tile) == num_kv_heads for tile in chosen)


@pytest.mark.parametrize("ends", [(16, 330), (64, 80, 330), (320, 330), (160, 320, 330)])
def test_a_chunk_decides_what_the_whole_prompt_decides(ends):
    query, keys = draw(330, seed=2)
    whole = listed(method().select_prefill(paged.prefill_view(query, keys, block_size=BLOCK)))
    parts, start = [], 0
    for end in ends:
        view = paged.prefill_view(query, keys, start=start, stop=end, block_size=BLOCK)
        parts += listed(method().select_prefill(view))
        start = end
    assert parts == whole


def test_more_tiles_than_a_slab_decide_like_fewer():
    query, keys = draw(40 * BLOCK, seed=3)
    view = paged.prefill_view(query, keys, block_size=BLOCK)
    late = paged.prefill_view(query, keys, start=35 * BLOCK, block_size=BLOCK)
    assert listed(method().select_prefill(view))[35:] == listed(method().select_prefill(late))


def test_bfloat16_inputs_are_judged_in_float32():
    query, keys = (tensor.bfloat16() for tensor in draw(200))
    chosen = method().select_prefill(paged.prefill_view(query, keys, block_size=BLOCK))
    assert listed(chosen) == expected(query.float(), keys.float(), 0.8)


def test_a_higher_tau_reads_more_and_one_reads_everything():
    view = paged.prefill_view(*draw(320), block_size=BLOCK)
    sums = [int(method(tau).select_prefill(view).counts.sum()) for tau in (1e-9, 0.5, 0.9, 1.0)]
    ends = sum(min(own + 1, 2) for own in range(20)) * 2
    assert sums[0] == ends < sums[1] < sums[2] < sums[3] == sum(range(21)) * 2


def test_the_stride_changes_the_estimate():
    view = paged.prefill_view(*draw(320), block_size=BLOCK)
    by_stride = [listed(method(stride=stride).select_prefill(view)) for stride in (2, 8)]
    assert by_stride[0] != by_stride[1]


@pytest.mark.parametrize("num_queries", [640, 600, 130, 77, 129])
def test_the_mask_keeps_the_blocks_that_serving_reads(num_queries):
    """Scores of the last queries, whether or not they begin with a tile."""
    query, keys = draw(640, 2, 2, block=128, seed=4)
    knobs = XAttention({"tau": 0.7})
    served = listed(knobs.select_prefill(paged.prefill_view(query, keys)))
    scores = torch.einsum("qhd,khd->hqk", query, keys)[None] / math.sqrt(8)
    scores = scores.masked_fill(torch.ones(640, 640, dtype=torch.bool).triu(1), -1e38)
    scores = scores.masked_fill(scores < -1e37, torch.finfo(scores.dtype).min)
    mask, stats = knobs.calculate_sparsity(scores[:, :, -num_queries:])
    last_tile = mask[0, :, -min(128, num_queries) :].unflatten(-1, (5, 128)).any(-1).any(-2)
    if num_queries >= 128:
        for head in range(2):
            assert last_tile[head].nonzero().flatten().tolist() == served[-1][head]
    assert 0 < stats["sparse_blocks"] < stats["total_blocks"]


def test_decoding_reads_everything():
    assert XAttention().select_decode(paged.decode_view(*draw(1), [1], page_size=BLOCK)) is None


def test_a_stride_that_does_not_divide_the_block_is_refused():
    with pytest.raises(UnsupportedError, match="128 tokens, got 7"):
        XAttention({"stride": 7}).check_servable(128)
    with pytest.raises(UnsupportedError, match="got 7"):
        XAttention({"stride": 7}).calculate_sparsity(torch.randn(1, 1, 128, 128))


@pytest.mark.parametrize(
    ("knob", "value"), [("stride", 1), ("stride", 65), ("tau", 0.0), ("tau", 1.01)]
)
def test_knobs_have_bounds(knob, value):
    with pytest.raises(InvalidKnobsError, match=knob):
        XAttention({knob: value})


def test_decisions_stay_as_they_were():
    """A released version never changes what it keeps."""
    view = paged.prefill_view(*draw(150), block_size=BLOCK)
    assert listed(method().select_prefill(view))[-1] == [[0, 1, 4, 7, 9], [0, 1, 2, 4, 9]]
