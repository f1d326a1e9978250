import math

import pytest
import torch

from sparse_methods import BlockSelection, InvalidKnobsError
from sparse_methods.methods.flashprefill_v1 import FlashPrefill
from tests.sparse_methods import paged

BLOCK = 16  # tokens
ENDS = {"sink_blocks": 1, "window_blocks": 1}


def draw(
    num_tokens: int, num_heads: int = 4, num_kv_heads: int = 2, block: int = BLOCK, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, Hq, 8] and [T, Hkv, 8]: noise around a direction per block, so that scores differ."""
    generator = torch.Generator().manual_seed(seed)

    def rows(num_heads: int) -> torch.Tensor:
        shape = (-(-num_tokens // block), num_heads, 8)
        centres = torch.randn(shape, generator=generator).repeat_interleave(block, 0)[:num_tokens]
        return centres + torch.randn(num_tokens, num_heads, 8, generator=generator)

    return rows(num_heads), rows(num_kv_heads)


def slow_share(query: torch.Tensor, keys: torch.Tensor, tile: int) -> list[float]:
    """Scores in words, of one head with [T, D] queries and keys; they sum to one."""
    scores = []
    for block in range(tile + 1):
        mean = keys[block * BLOCK : (block + 1) * BLOCK].mean(0)
        rows = query[tile * BLOCK : (tile + 1) * BLOCK]
        scores.append(sum(math.exp(float(row @ mean) / math.sqrt(8)) for row in rows))
    return [score / sum(scores) for score in scores]


def expected(
    query: torch.Tensor, keys: torch.Tensor, alpha: float, sink: int = 1, window: int = 1
) -> list[list[list[int]]]:
    group = query.shape[1] // keys.shape[1]
    tiles = []
    for tile in range(-(-query.shape[0] // BLOCK)):
        heads = []
        for kv_head in range(keys.shape[1]):
            shares = [
                slow_share(query[:, kv_head * group + g], keys[:, kv_head], tile)
                for g in range(group)
            ]
            sums = [sum(column) for column in zip(*shares, strict=True)]
            heads.append(
                [
                    block
                    for block, score in enumerate(sums)
                    if score >= alpha * max(sums) or block < sink or block > tile - window
                ]
            )
        tiles.append(heads)
    return tiles


def listed(selection: BlockSelection) -> list[list[list[int]]]:
    """Blocks by tile and KV head."""
    return [
        [row[:count] for row, count in zip(rows, counts, strict=True)]
        for rows, counts in zip(selection.indices.tolist(), selection.counts.tolist(), strict=True)
    ]


@pytest.mark.parametrize("num_tokens", [1, 2, 15, 16, 17, 159, 160, 161, 170])
@pytest.mark.parametrize(("sink", "window"), [(1, 1), (2, 4), (3, 1)])
def test_the_blocks_are_those_of_the_rule_whatever_the_length(num_tokens, sink, window):
    query, keys = draw(num_tokens)
    method = FlashPrefill({"alpha": 0.5, "sink_blocks": sink, "window_blocks": window})
    chosen = listed(method.select_prefill(paged.prefill_view(query, keys, block_size=BLOCK)))
    assert chosen == expected(query, keys, 0.5, sink, window)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (2, 2), (6, 2), (8, 1)])
def test_the_heads_of_a_group_decide_together(num_heads, num_kv_heads):
    query, keys = draw(200, num_heads, num_kv_heads, seed=1)
    method = FlashPrefill({"alpha": 0.5, **ENDS})
    chosen = listed(method.select_prefill(paged.prefill_view(query, keys, block_size=BLOCK)))
    assert chosen == expected(query, keys, 0.5)
    assert all(len(tile) == num_kv_heads for tile in chosen)


def test_a_head_with_larger_queries_does_not_decide_alone():
    """Both heads name a block of their own; one is ten times as sure."""
    keys = torch.zeros(10 * BLOCK, 1, 8)
    keys[3 * BLOCK : 4 * BLOCK, 0, 0] = keys[5 * BLOCK : 6 * BLOCK, 0, 1] = 10.0
    query = torch.zeros(10 * BLOCK, 2, 8)
    query[:, 0, 0], query[:, 1, 1] = 20.0, 2.0
    view = paged.prefill_view(query, keys, block_size=BLOCK)
    chosen = FlashPrefill({"alpha": 0.5, **ENDS}).select_prefill(view)
    assert listed(chosen)[9] == [[0, 3, 5, 9]]


@pytest.mark.parametrize("ends", [(16, 330), (64, 80, 330), (320, 330), (160, 320, 330)])
def test_a_chunk_decides_what_the_whole_prompt_decides(ends):
    query, keys = draw(330, seed=2)
    method = FlashPrefill({"alpha": 0.5, **ENDS})
    whole = listed(method.select_prefill(paged.prefill_view(query, keys, block_size=BLOCK)))
    parts, start = [], 0
    for end in ends:
        view = paged.prefill_view(query, keys, start=start, stop=end, block_size=BLOCK)
        parts += listed(method.select_prefill(view))
        start = end
    assert parts == whole


def test_more_tiles_than_a_slab_decide_like_fewer():
    query, keys = draw(40 * BLOCK, seed=3)
    method = FlashPrefill({"alpha": 0.5, **ENDS})
    view = paged.prefill_view(query, keys, block_size=BLOCK)
    late = paged.prefill_view(query, keys, start=35 * BLOCK, block_size=BLOCK)
    assert listed(method.select_prefill(view))[35:] == listed(method.select_prefill(late))


def test_bfloat16_inputs_are_judged_in_float32():
    query, keys = (tensor.bfloat16() for tensor in draw(200))
    method = FlashPrefill({"alpha": 0.5, **ENDS})
    chosen = method.select_prefill(paged.prefill_view(query, keys, block_size=BLOCK))
    assert listed(chosen) == expected(query.float(), keys.float(), 0.5)


def test_a_higher_alpha_reads_less_and_zero_reads_everything():
    view = paged.prefill_view(*draw(320), block_size=BLOCK)
    sums = [
        int(FlashPrefill({"alpha": alpha, **ENDS}).select_prefill(view).counts.sum())
        for alpha in (0.0, 0.1, 0.5, 1.0)
    ]
    assert sums[0] == sum(range(21)) * 2 > sums[1] > sums[2] > sums[3]


def test_a_flat_tile_reads_everything_and_a_sharp_one_little():
    query, keys = torch.zeros(320, 1, 8), torch.zeros(320, 1, 8)
    keys[5 * BLOCK : 6 * BLOCK, 0, 0] = 10.0
    query[19 * BLOCK :, 0, 0] = 10.0  # the last tile asks for block 5, the others for nothing
    chosen = FlashPrefill(ENDS).select_prefill(paged.prefill_view(query, keys, block_size=BLOCK))
    assert listed(chosen)[18] == [list(range(19))]
    assert listed(chosen)[19] == [[0, 5, 19]]


@pytest.mark.parametrize("num_queries", [1, 40, 128, 200, 500])
def test_materialised_scores_give_the_same_rule_with_the_mean_of_what_is_seen(num_queries):
    generator = torch.Generator().manual_seed(5)
    scores = 2 * torch.randn(1, 2, num_queries, 500, generator=generator)
    scores += torch.randn(1, 2, 1, 4, generator=generator).repeat_interleave(128, -1)[..., :500]
    mask, stats = FlashPrefill({"alpha": 0.6, **ENDS}).calculate_sparsity(scores)
    assert stats["phase"] == ("decode" if num_queries == 1 else "prefill")
    first = 500 - num_queries
    kept_table = []
    for head in range(2):
        for tile in range(first // 128, 4):
            rows = range(max(tile * 128, first), min((tile + 1) * 128, 500))
            sums = [
                sum(
                    math.exp(float(scores[0, head, row - first, block * 128 : stop].mean()))
                    for row in rows
                    for stop in [min(row + 1, (block + 1) * 128)]
                )
                for block in range(tile + 1)
            ]
            for block, score in enumerate(sums):
                is_kept = num_queries == 1 or score >= 0.6 * max(sums) or block in {0, tile}
                kept_table.append(is_kept)
                last = rows[-1]
                part = mask[0, head, last - first, block * 128 : min(last + 1, (block + 1) * 128)]
                assert part.all() if is_kept else not part.any()
    assert stats["sparse_blocks"] == kept_table.count(False)
    assert num_queries == 1 or kept_table.count(False) > 0


def test_decoding_reads_everything():
    assert FlashPrefill().select_decode(paged.decode_view(*draw(1), [1], page_size=BLOCK)) is None


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("alpha", -0.1),
        ("alpha", 1.1),
        ("sink_blocks", 0),
        ("sink_blocks", 65),
        ("window_blocks", 0),
        ("window_blocks", 4097),
    ],
)
def test_knobs_have_bounds(knob, value):
    with pytest.raises(InvalidKnobsError, match=knob):
        FlashPrefill({knob: value})


def test_decisions_stay_as_they_were():
    """A released version never changes what it keeps."""
    view = paged.prefill_view(*draw(150), block_size=BLOCK)
    assert listed(FlashPrefill({"alpha": 0.5, **ENDS}).select_prefill(view))[-1] == [
        [0, 1, 2, 3, 4, 5, 7, 9],
        [0, 1, 4, 9],
    ]


def test_generated_keys_in_the_prompts_last_page_do_not_count():
    """A request that starts over computes them in the same step as the prompt's end."""
    query, keys = draw(10 * BLOCK + 3)
    view = paged.prefill_view(query, keys, block_size=BLOCK)
    method = FlashPrefill({"alpha": 0.5, **ENDS})
    before = method.select_prefill(view)
    assert view.summaries is not None
    view.summaries.total[view.pages[-1]] += 100 * view.query[-1].unflatten(0, (2, -1)).sum(1)
    after = method.select_prefill(view)
    assert torch.equal(after.counts, before.counts)
    assert (before.counts[-1] > 2).any()
