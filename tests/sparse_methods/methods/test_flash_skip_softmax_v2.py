"""Flash skip softmax v2: the visiting order, the counts, and the target sparsity."""

import math

import pytest
import torch

from sparse_methods import Phase, UnsupportedError, get_sparse_method
from sparse_methods.calibration.artifact import Fit, MethodCalibration, PhaseCalibration
from sparse_methods.kernels import reference
from sparse_methods.kernels.operation import (
    AttentionInputs,
    LayerGeometry,
    PageTable,
    QueryTiles,
    Tile,
)
from sparse_methods.views import ThresholdView
from tests.sparse_methods import paged

Skip = get_sparse_method("flash_skip_softmax", "v2")
BLOCK, HEADS, DIM, LAYERS = 128, 2, 16, 4


def qkv(num_tokens: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """[T, H, D] with neighbours alike, so that some blocks matter and others do not."""
    generator = torch.Generator().manual_seed(seed)
    topics = torch.randn(num_tokens // 100 + 1, HEADS, DIM, generator=generator)
    base = topics.repeat_interleave(100, 0)[:num_tokens] * 1.6
    noise = torch.randn(3, num_tokens, HEADS, DIM, generator=generator) * 0.5
    return base + noise[0], base + noise[1], noise[2]


def scores_of(query: torch.Tensor, key: torch.Tensor, start: int = 0) -> torch.Tensor:
    scores = torch.einsum("qhd,khd->hqk", query[start:] * DIM**-0.5, key)[None]
    hidden = torch.arange(len(key)) > torch.arange(start, len(key))[:, None]
    return scores.masked_fill(hidden, torch.finfo(scores.dtype).min)


def rule(scores: torch.Tensor, threshold: float, start: int = 0) -> set[tuple[int, int, int]]:
    """(head, tile, block) kept of [1, H, rows, keys], stated row by row in plain loops."""
    kept, values = set(), scores[0].tolist()
    num_keys = scores.shape[-1]
    for head in range(len(values)):
        for own in range(start // BLOCK, (num_keys - 1) // BLOCK + 1):
            rows = range(max(own * BLOCK, start), min((own + 1) * BLOCK, num_keys))
            best = dict.fromkeys(rows, -math.inf)
            for block in [own, *range(own)]:
                is_kept = False
                for row in rows:
                    stop = min((block + 1) * BLOCK, row + 1)
                    largest = max(values[head][row - start][block * BLOCK : stop])
                    best[row] = max(best[row], largest)
                    is_kept |= largest - best[row] > math.log(threshold)
                if is_kept:
                    kept.add((head, own, block))
    return kept


def kept_of(mask: torch.Tensor, start: int = 0) -> set[tuple[int, int, int]]:
    before, after = start % BLOCK, -mask.shape[-1] % BLOCK
    padded = torch.nn.functional.pad(mask[0], (0, after, before, after))
    table = padded.unflatten(1, (-1, BLOCK)).unflatten(3, (-1, BLOCK)).any(4).any(2)
    return {(h, tile + start // BLOCK, block) for h, tile, block in table.nonzero().tolist()}


def attend(query, key, value, threshold, *, start=0, decode=False, group=1):
    cache, pages = paged.lay_out(key, BLOCK)
    values = torch.zeros_like(cache)
    for index, page in enumerate(pages.tolist()):
        part = value[index * BLOCK : (index + 1) * BLOCK]
        values[page, : len(part)] = part
    num_tokens, tiles = query.shape[0], []
    position = start
    while position < num_tokens:
        end = position + 1 if decode else min((position // BLOCK + 1) * BLOCK, num_tokens)
        tiles.append(Tile(position - start, end - position, position, 0, decode))
        position = end
    num_tiles = len(tiles)
    return reference.attend(
        AttentionInputs(
            query=query[start:],
            keys=cache,
            values=values,
            page_table=PageTable(pages[None]),
            tiles=QueryTiles(tuple(tiles), BLOCK, query.device),
            geometry=LayerGeometry(HEADS * group, HEADS, DIM, DIM, DIM**-0.5),
            log_thresholds=torch.full((num_tiles,), math.log(threshold)),
            diagonal_first=torch.ones(num_tiles, dtype=torch.bool),
        )
    )


@pytest.mark.parametrize(("num_tokens", "start"), [(384, 0), (450, 0), (500, 200), (130, 129)])
@pytest.mark.parametrize("threshold", [0.02, 0.5])
def test_the_mask_is_the_rule_stated_row_by_row(num_tokens, start, threshold):
    query, key, _ = qkv(num_tokens)
    scores = scores_of(query, key, start)
    method = Skip({"prefill_threshold": threshold, "decode_threshold": threshold})
    mask, stats = method.calculate_sparsity(scores)
    expected = rule(scores, threshold, start)
    assert kept_of(mask, start) == expected
    tiles = range(start // BLOCK, (num_tokens - 1) // BLOCK + 1)
    assert stats["total_blocks"] == HEADS * sum(own + 1 for own in tiles)
    assert stats["total_blocks"] - stats["sparse_blocks"] == len(expected)


@pytest.mark.parametrize(("num_tokens", "start"), [(1024, 0), (1000, 0), (1000, 512)])
@pytest.mark.parametrize("threshold", [0.02, 0.3])
def test_the_scores_keep_what_the_kernel_keeps(num_tokens, start, threshold):
    """Counts per head, and the output of the masked softmax: the same blocks, not only as many."""
    query, key, value = qkv(num_tokens)
    scores = scores_of(query, key, start)
    method = Skip({"prefill_threshold": threshold})
    mask, stats = method.calculate_sparsity(scores)
    outputs = attend(query, key, value, threshold, start=start)
    per_head = torch.tensor(
        [sum(head == h for head, *_ in kept_of(mask, start)) for h in range(HEADS)]
    )
    total, _, skipped = outputs.blocks.sum(0).unbind(-1)
    assert torch.equal(total - skipped, per_head)
    assert (stats["total_blocks"], stats["sparse_blocks"]) == (int(total.sum()), int(skipped.sum()))
    assert 0 < stats["sparse_blocks"] < stats["total_blocks"]
    weights = method.apply_sparsity(scores, mask).softmax(-1)[0]
    expected = torch.einsum("hqk,khd->qhd", weights, value)
    assert torch.allclose(outputs.output, expected, atol=1e-5)


def test_a_decode_row_keeps_what_the_kernel_keeps():
    query, key, value = qkv(1000)
    method = Skip({"decode_threshold": 0.3})
    outputs = attend(query, key, value, 0.3, start=990, decode=True)
    for row in range(10):
        stop = 991 + row
        _, stats = method.calculate_sparsity(scores_of(query[:stop], key[:stop], stop - 1))
        assert stats["sparse_blocks"] == int(outputs.blocks[row, :, 2].sum()) > 0


def test_the_own_block_stays_whatever_the_threshold_and_goes_first():
    query, key, _ = qkv(640)
    scores = scores_of(query, key)
    mask, stats = Skip({"prefill_threshold": 0.999}).calculate_sparsity(scores)
    kept = kept_of(mask)
    assert all((head, own, own) in kept for head in range(HEADS) for own in range(5))
    left_to_right = get_sparse_method("flash_skip_softmax", "v1")(
        {"threshold": {"prefill": 0.999}}
    ).calculate_sparsity(scores)[1]["sparsity"]
    assert stats["sparsity"] > left_to_right
    assert all(Skip().visits_diagonal_first(phase) for phase in Phase)


def test_half_precision_scores_are_decided_in_float32():
    query, key, _ = qkv(384)
    scores = scores_of(query, key).bfloat16()
    mask, _ = Skip().calculate_sparsity(scores)
    assert kept_of(mask) == rule(scores.float().clamp(min=-1e30), 0.1)


def test_the_decisions_of_a_seeded_input_are_pinned():
    query, key, _ = qkv(1024, seed=7)
    counts = [
        Skip({"prefill_threshold": t}).calculate_sparsity(scores_of(query, key))[1]["sparse_blocks"]
        for t in (0.001, 0.1, 0.9)
    ]
    assert counts == GOLDEN


GOLDEN = [0, 10, 38]


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"prefill_threshold": 1.0}, "less than 1"),
        ({"decode_threshold": -0.1}, "greater than or equal to 0"),
        ({"target_sparsity": 0.96}, "less than or equal to 0.95"),
        ({"decode_target_sparsity": -0.1}, "greater than or equal to 0"),
    ],
)
def test_knobs_have_bounds(knobs, words):
    with pytest.raises(ValueError, match=words):
        Skip(knobs)


def test_thresholds_are_the_knobs_and_stay_below_1():
    method = Skip({"prefill_threshold": 0.2, "decode_threshold": 0.0})
    assert method.skip_threshold(Phase.PREFILL, 10) == 0.2
    assert method.skip_threshold(Phase.DECODE, 10) is None
    largest = Skip({"prefill_threshold": math.nextafter(1, 0)}).skip_threshold(Phase.PREFILL, 1)
    assert largest is not None
    assert largest < 1
    assert method.get_threshold_info()["value"] == {"prefill": 0.2, "decode": 0.0}
    assert method.adapt_thresholds(view([1], [[0, 0, 0]], 0)) is None


# Target sparsity ------------------------------------------------------------------------------


def fit(a: float = 0.02, b: float = 20.0, p: float = 0.3, **changes: float) -> Fit:
    known = {"r_squared": 0.9, "min_sparsity": 0.1, "max_sparsity": 0.7, "num_points": 9}
    return Fit(a=a, b=b, p=p, **{**known, **changes})


def calibration(block_size: int = BLOCK) -> MethodCalibration:
    phase = PhaseCalibration(layers=tuple(fit() for _ in range(LAYERS)))
    return MethodCalibration(
        method="flash_skip_softmax",
        version="v2",
        block_size=block_size,
        phases={Phase.PREFILL: phase, Phase.DECODE: phase},
    )


def calibrated(**knobs: float):
    return Skip(knobs).with_calibration(calibration())


def view(num_blocks, blocks, layer, *, phase=Phase.PREFILL, kv_len=8192) -> ThresholdView:
    num_blocks = torch.tensor(num_blocks)
    kv_lens = torch.full_like(num_blocks, kv_len) if phase is Phase.PREFILL else num_blocks * BLOCK
    return ThresholdView(phase, kv_lens, num_blocks, torch.as_tensor(blocks), layer, LAYERS)


def test_a_target_without_a_calibration_is_refused():
    for knob in ("target_sparsity", "decode_target_sparsity"):
        with pytest.raises(UnsupportedError, match=f"'{knob}'.*needs a calibration"):
            Skip({knob: 0.5}).check_servable(BLOCK)
        calibrated(**{knob: 0.5}).check_servable(BLOCK)
        with pytest.raises(UnsupportedError, match=r"blocks of 128 tokens.*have 64"):
            calibrated(**{knob: 0.5}).check_servable(64)
    Skip().check_servable(64)


def test_the_base_threshold_is_the_formula_of_the_fit():
    at_reference = calibrated(target_sparsity=0.5).skip_threshold(Phase.PREFILL, 4096)
    assert at_reference == pytest.approx(0.02 * math.exp(20 * 0.5) / 4096)
    longer = calibrated(target_sparsity=0.5).skip_threshold(Phase.PREFILL, 8192)
    density = 0.5 * 2**0.3
    assert longer == pytest.approx(0.02 * math.exp(20 * (1 - density)) / 8192)
    assert calibrated(target_sparsity=0.95).skip_threshold(Phase.PREFILL, 128) == 0.99
    assert calibrated(target_sparsity=0.0).skip_threshold(Phase.PREFILL, 4096) is None
    assert calibrated(target_sparsity=0.5).skip_threshold(Phase.DECODE, 4096) == 0.01


def test_the_first_layer_takes_the_base_threshold():
    """Tiles early and late in a prompt start alike: none of them has skipped anything yet."""
    method = calibrated(target_sparsity=0.5, decode_target_sparsity=0.5)
    blocks = torch.zeros(3, 3, dtype=torch.int64)
    logs = method.adapt_thresholds(view([16, 40, 64], blocks, 0))
    base = math.log(method.skip_threshold(Phase.PREFILL, 8192))
    assert logs.dtype == torch.float32
    assert logs.tolist() == pytest.approx([base] * 3, abs=1e-4)
    decoded = method.adapt_thresholds(view([16, 40, 64], blocks, 0, phase=Phase.DECODE))
    expected = [math.log(method.skip_threshold(Phase.DECODE, n * BLOCK)) for n in (16, 40, 64)]
    assert decoded.tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("phase", list(Phase))
def test_what_the_layers_before_left_undone_the_next_ones_make_up_for(phase):
    method = calibrated(target_sparsity=0.5, decode_target_sparsity=0.5)
    blocks = [[800, 800, skipped] for skipped in (100, 400, 700)]
    behind, level, ahead = method.adapt_thresholds(view([50] * 3, blocks, 2, phase=phase)).tolist()
    assert behind > level > ahead
    assert all(math.log(1e-6) - 1e-4 <= value < 0 for value in (behind, level, ahead))


def test_a_model_unlike_its_calibration_still_lands_on_the_target():
    """Layers obey the formula of a tile, but each is off by a factor the fit does not know."""
    for phase in Phase:
        for target in (0.3, 0.5, 0.6):
            method = calibrated(target_sparsity=target, decode_target_sparsity=target)
            num_blocks = torch.arange(1, 65)
            blocks = torch.zeros(64, 3, dtype=torch.int64)
            for layer, factor in enumerate((0.3, 4.0, 8.0, 2.0)):
                logs = method.adapt_thresholds(
                    view(num_blocks.tolist(), blocks, layer, phase=phase)
                )
                skipped = simulate(logs + math.log(factor), num_blocks, phase) * 1000
                total = num_blocks * 1000
                blocks = blocks + torch.stack([total, total, skipped.round().long()], -1)
            late = blocks[31:]
            share = late[:, 2] / late[:, 0]
            if phase is Phase.DECODE:
                assert (share - target).abs().max() < 0.06
            total, _, skipped = blocks.sum(0).tolist()
            if phase is Phase.PREFILL:
                assert abs(skipped / total - target) < 0.04


def simulate(logs: torch.Tensor, num_blocks: torch.Tensor, phase: Phase) -> torch.Tensor:
    """[N] blocks skipped: what the last block of rows adds to the prompt's, by ``Fit.sparsity``."""
    one = fit()
    skipped = []
    for log, blocks in zip(logs.tolist(), num_blocks.tolist(), strict=True):
        here = one.sparsity(log, blocks * BLOCK)
        if phase is Phase.DECODE:
            skipped.append(here * blocks)
            continue
        before = one.sparsity(log, (blocks - 1) * BLOCK) if blocks > 1 else 0.0
        added = here * blocks * (blocks + 1) / 2 - before * blocks * (blocks - 1) / 2
        skipped.append(min(max(added, 0.0), blocks - 1.0))
    return torch.tensor(skipped)


def test_a_tile_is_adapted_alike_alone_and_in_a_batch():
    method = calibrated(target_sparsity=0.5)
    num_blocks = list(range(1, 38))
    blocks = torch.stack([torch.arange(37) * 8 + 8] * 3, -1)
    blocks[:, 2] = blocks[:, 0] * 3 // 7
    together = method.adapt_thresholds(view(num_blocks, blocks, 3))
    alone = [
        method.adapt_thresholds(view(num_blocks[i : i + 1], blocks[i : i + 1], 3))
        for i in range(37)
    ]
    assert torch.equal(together, torch.cat(alone))


def test_a_target_out_of_range_is_said():
    assert calibrated(target_sparsity=0.5).fallback(4096) is None
    assert calibrated().fallback(10) is None
    short = calibrated(target_sparsity=0.6).fallback(256)
    assert short is not None
    assert "outside of those tried" in short.reason
    assert short.cause == "outside_of_calibration"
    assert "threshold near 0.99" in short.to
    extrapolated = calibrated(target_sparsity=0.75).fallback(65536)
    assert extrapolated is not None
    assert "observed 0.10 to 0.70" in extrapolated.reason
    decode = calibrated(decode_target_sparsity=0.9).fallback(128)
    assert decode is not None
    assert decode.reason.startswith("Decode")
    dense = calibrated(target_sparsity=0.5, dense_below=5000).fallback(4096)
    assert (dense.to, dense.cause) == ("dense", "below_break_even")


def test_a_calibrated_method_says_so_and_is_another_value():
    method = calibrated(target_sparsity=0.5)
    info = method.get_threshold_info()
    assert info["type"] == "dynamic_calibrated"
    assert info["value"] == {"prefill": None, "decode": 0.01}
    assert info["phases"]["prefill"]["target_sparsity"] == 0.5
    assert info["phases"]["prefill"]["r_squared"] == 0.9
    assert set(info["phases"]["prefill"]["example_thresholds"]) == {"4096", "16384", "65536"}
    assert "example_thresholds" not in info["phases"]["decode"]
    assert method != Skip({"target_sparsity": 0.5})
    assert method == calibrated(target_sparsity=0.5)
    assert hash(method) == hash(calibrated(target_sparsity=0.5))
