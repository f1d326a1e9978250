"""What kernels say that sampled rows look at, against the same in plain torch."""

import functools
from dataclasses import replace

import pytest
import torch

from sparse_methods.kernels import triton_samples
from sparse_methods.kernels.triton_samples import Choice
from tests.sparse_methods import paged
from tests.sparse_methods.kernels.cases import DEVICE

HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16  # as the interpreter allows
CASES = {  # tokens, heads, KV heads, head dim, block size, where a chunk starts and stops, dtype
    "mha": (300, 2, 2, 16, 64, 0, None, torch.float32),
    "groups of 3": (161, 3, 1, 64, 32, 0, None, torch.float32),
    "groups of 4": (200, 8, 2, 96, 24, 72, None, torch.float32),
    "half": (200, 4, 1, 128, 64, 0, 128, HALF),
    "one row": (1, 2, 1, 16, 128, 0, None, torch.float32),
    "a row in a later tile": (257, 2, 1, 16, 128, 128, None, torch.float32),
    "small blocks": (75, 2, 1, 16, 8, 8, 72, torch.float32),
}


def prompt(num_tokens, heads, kv_heads, head_dim, block_size, start, stop, dtype):
    generator = torch.Generator().manual_seed(0)
    draw = lambda count: torch.randn(num_tokens, count, head_dim, generator=generator)  # noqa: E731
    query, keys = 2 * draw(heads).to(dtype), draw(kv_heads).to(dtype)
    view = paged.prefill_view(query, keys, block_size=block_size, start=start, stop=stop)
    return paged.on(view, DEVICE)


def scores_of(view, stride, tile):
    """[Hkv, G, S, keys] float64 of the rows a tile samples, the last first, -inf where hidden."""
    last = min(view.num_rows, (tile + 1) * view.block_size) - 1
    rows = torch.arange(last, tile * view.block_size - 1, -stride, device=view.query.device)
    query = view.query[rows].double().unflatten(1, (view.num_kv_heads, -1)).permute(1, 2, 0, 3)
    scores = query @ view.gather_keys().double()[:, None].mT * view.scale
    keys = torch.arange(view.kv_len, device=rows.device)
    return scores.masked_fill(keys > (view.position + rows)[:, None], float("-inf"))


def by_block(values, view):
    padded = torch.nn.functional.pad(values, (0, view.num_blocks * view.block_size - view.kv_len))
    return padded.unflatten(-1, (view.num_blocks, view.block_size)).sum(-1)


def lines_of(view, stride, tile, choice, trusted):
    """Columns and diagonals [Hkv, keys] of one tile; ``trusted`` [Hkv, G] heads have a say."""
    attention = scores_of(view, stride, tile).softmax(-1) * trusted[..., None, None]
    block = torch.arange(view.kv_len, device=DEVICE) // view.block_size
    own = view.first_block + tile
    attention *= (block >= choice.first) & (block <= own - choice.recent)
    rows = attention.mean((1,)) / attention.shape[2]
    padded = torch.nn.functional.pad(rows, (0, view.num_blocks * view.block_size - view.kv_len))
    width = padded.shape[-1]
    shifted = [
        torch.nn.functional.pad(padded[:, step], (step * stride, 0))[:, :width]
        for step in range(padded.shape[1])
    ]
    return padded.sum(1), torch.stack(shifted).sum(0)


def close(given, expected, view):
    tolerance = 2e-5 if view.query.dtype == torch.float32 else 2e-4
    torch.testing.assert_close(given.double(), expected, rtol=20 * tolerance, atol=tolerance)


@pytest.mark.parametrize("stride", [5, 16])
@pytest.mark.parametrize("case", CASES)
def test_rows_look_at_blocks_as_their_softmax_does(case, stride):
    view = prompt(*CASES[case])
    assert triton_samples.can_sample(view)
    sampled = triton_samples.sample(view, stride)
    own_means = triton_samples.own_means(view, stride)
    for tile in range(view.num_tiles):
        scores = scores_of(view, stride, tile)
        close(sampled.mass[:, :, tile], by_block(scores.softmax(-1).mean(2), view), view)
        norms = sampled.norms[:, :, tile]
        close(norms[..., : scores.shape[2]], scores.logsumexp(-1), view)
        assert norms[..., scores.shape[2] :].isinf().all()
        seen = scores[..., (view.first_block + tile) * view.block_size :]
        is_seen = seen > float("-inf")
        total = seen.masked_fill(~is_seen, 0.0).sum((2, 3))
        close(own_means[:, :, tile], total / is_seen.sum((2, 3)), view)


@pytest.mark.parametrize("choice", [Choice(), Choice(first=1, recent=1)])
@pytest.mark.parametrize("case", CASES)
def test_lines_add_up_over_the_rows_and_heads_that_have_a_say(case, choice):
    view = prompt(*CASES[case])
    sampled = triton_samples.sample(view, 5)
    trusted = torch.rand(sampled.norms.shape[:3], generator=torch.Generator().manual_seed(0)) < 0.6
    trusted = trusted.to(DEVICE)
    some = sampled.without(~trusted[..., None])
    tiles = range(view.num_tiles)
    columns = triton_samples.columns(view, some, tiles, choice)
    diagonals = triton_samples.diagonals(view, some, tiles, choice)
    for tile in tiles:
        expected = lines_of(view, 5, tile, choice, trusted[:, :, tile])
        stop = (view.first_block + tile + 1) * view.block_size
        close(columns[:, tile, :stop], expected[0][:, :stop], view)
        close(diagonals[:, tile, :stop], expected[1][:, :stop], view)


def test_a_group_of_which_no_head_has_a_say_has_no_lines():
    view = prompt(*CASES["mha"])
    sampled = triton_samples.sample(view, 16)
    nobody = sampled.without(torch.ones(2, 1, 5, 1, dtype=torch.bool, device=DEVICE))
    given = triton_samples.columns(view, nobody, range(view.num_tiles), Choice())
    assert all((given[:, tile, : (tile + 1) * 64] == 0).all() for tile in range(5))


def test_a_slab_of_tiles_at_a_time_gives_the_same(monkeypatch):
    view = prompt(300, 4, 2, 16, 32, 0, None, torch.float32)
    whole = triton_samples.sample(view, 8)
    lines = triton_samples.diagonals(view, whole, range(10), Choice())
    monkeypatch.setattr(triton_samples, "_MAX_HELD", 3 * 2 * 2 * 2 * 4 * 10)
    parts = triton_samples.sample(view, 8)
    torch.testing.assert_close(parts.mass, whole.mass, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(parts.norms, whole.norms)
    part = triton_samples.diagonals(view, whole, range(3, 7), Choice())
    assert part.shape == (2, 4, 7 * 32)
    for tile in range(4):
        stop = (tile + 4) * 32
        torch.testing.assert_close(part[:, tile, :stop], lines[:, tile + 3, :stop])


def test_memory_is_bounded_by_tiles_at_a_time(monkeypatch):
    view = prompt(300, 4, 2, 16, 32, 0, None, torch.float32)
    monkeypatch.setattr(triton_samples, "_MAX_HELD", 3 * 2 * 320)
    assert triton_samples.lines_at_once(view) == 3
    monkeypatch.setattr(triton_samples, "_MAX_HELD", 1)
    assert triton_samples.lines_at_once(view) == 1


@pytest.mark.parametrize("stride", [4, 16])
def test_a_chunk_is_estimated_as_in_the_whole_prompt(stride):
    """To the last bit on a GPU; the interpreter's products are rounded by where a row lies."""
    tolerance = 0.0 if DEVICE.type == "cuda" else 1e-6
    assert_same = functools.partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
    whole, part = (
        prompt(300, 4, 2, 16, 32, start, stop, torch.float32)
        for start, stop in ((0, 300), (128, 256))
    )
    samples = [triton_samples.sample(view, stride) for view in (whole, part)]
    assert_same(samples[0].mass[:, :, 4:8, :8], samples[1].mass)
    assert_same(samples[0].norms[:, :, 4:8], samples[1].norms)
    means = [triton_samples.own_means(view, stride) for view in (whole, part)]
    assert_same(means[0][:, :, 4:8], means[1])
    for add_up in (triton_samples.columns, triton_samples.diagonals):
        lines = add_up(whole, samples[0], range(10), Choice(1, 2))
        of_part = add_up(part, samples[1], range(4), Choice(1, 2))
        for tile in range(4):
            stop = (tile + 5) * 32
            assert_same(lines[:, tile + 4, :stop], of_part[:, tile, :stop])


@pytest.mark.parametrize("case", ["groups of 3", "groups of 4"])
def test_what_nobody_wrote_is_not_read(case):
    view = prompt(*CASES[case])
    samples, tiles = triton_samples.sample(view, 5), range(view.num_tiles)
    results = [samples.mass, triton_samples.own_means(view, 5)]
    results += [triton_samples.diagonals(view, samples, tiles, Choice())[:, -1]]
    assert view.kv_len % view.block_size
    view.keys[view.pages[-1], view.kv_len % view.block_size :] = float("nan")
    again = triton_samples.sample(view, 5)
    others = [again.mass, triton_samples.own_means(view, 5)]
    others += [triton_samples.diagonals(view, again, tiles, Choice())[:, -1]]
    assert all(torch.equal(a, b) for a, b in zip(results, others, strict=True))


def test_what_kernels_cannot_sample_is_known():
    view = prompt(*CASES["mha"])
    wide = replace(view, keys=torch.empty(9, 128, 2, 512, device=DEVICE), block_size=128)
    assert not triton_samples.can_sample(wide)
