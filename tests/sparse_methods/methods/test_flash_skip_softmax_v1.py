"""The contract's own expectations in our words."""

import hashlib
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional

from sparse_methods.methods.flash_skip_softmax_v1 import FlashSkipSoftmax
from tests.sparse_methods.methods.flash_skip_scores import (
    LISTS,
    LOWEST,
    SCALAR,
    as_numbers,
    both_generations,
    gaussian,
    uneven,
)


def oracle(
    scores: torch.Tensor, block_rows: int, block_keys: int, threshold: float
) -> torch.Tensor:
    """[R, C] kept blocks of one head, by the rule as the contract's text has it, in plain loops."""
    rows, columns = math.ceil(scores.shape[0] / block_rows), math.ceil(scores.shape[1] / block_keys)
    padded = torch.full((rows * block_rows, columns * block_keys), LOWEST)
    padded[: scores.shape[0], : scores.shape[1]] = scores
    kept = torch.zeros(rows, columns, dtype=torch.bool)
    for index, row in enumerate(padded.tolist()):
        running = -math.inf
        for column in range(columns):
            largest = max(row[column * block_keys : (column + 1) * block_keys])
            running = max(running, largest)
            if largest - running > math.log(threshold):
                kept[index // block_rows, column] = True
    return kept


@both_generations
def test_the_name_is_the_registered_one(config):
    assert FlashSkipSoftmax(config).name == "flash_skip_softmax"


@both_generations
def test_batches_and_heads_decide_on_their_own(config):
    scores = uneven(256, 512)
    mask, _ = FlashSkipSoftmax(config).calculate_sparsity(scores)
    for index in range(scores.shape[0]):
        for head in range(scores.shape[1]):
            part = (slice(index, index + 1), slice(head, head + 1))
            alone, _ = FlashSkipSoftmax(config).calculate_sparsity(scores[part])
            assert torch.equal(mask[part], alone)
    assert not torch.equal(mask[0], mask[1])


@both_generations
def test_one_query_row_is_decoding(config):
    method = FlashSkipSoftmax(config)
    assert method._infer_phase(torch.randn(2, 4, 64, 64)) == "prefill"
    assert method._infer_phase(torch.randn(2, 4, 1, 64)) == "decode"


def test_scalar_thresholds_follow_the_phase():
    method = FlashSkipSoftmax(SCALAR)
    assert method.threshold == 1e-3
    method._update_threshold("decode")
    assert method.threshold == 1e-5
    method._update_threshold("prefill")
    assert method.threshold == 1e-3


def test_threshold_lists_follow_the_phase():
    method = FlashSkipSoftmax(LISTS)
    before = method.thresholds
    method._update_thresholds("decode")
    assert method.thresholds == [1e-5] != before
    method._update_thresholds("prefill")
    assert method.thresholds == [1e-3]


@pytest.mark.parametrize(
    ("shape", "blocked_shape", "rest"),
    [
        ((2, 4, 256, 256), (2, 4, 2, 128, 2, 128), (2, 2, 256, 256)),
        ((2, 4, 200, 300), (2, 4, 2, 128, 3, 128), (2, 3, 256, 384)),
    ],
)
def test_scores_are_cut_into_blocks_and_padded_with_the_lowest_value(shape, blocked_shape, rest):
    scores = torch.randn(shape)
    blocked, *numbers = FlashSkipSoftmax(SCALAR)._reshape_to_blocks(scores, 128, 128)
    assert blocked.shape == blocked_shape
    assert tuple(numbers) == rest
    whole = blocked.reshape(*shape[:2], *rest[2:])
    assert torch.equal(whole[:, :, : shape[2], : shape[3]], scores)
    assert (whole[:, :, shape[2] :] == LOWEST).all()
    assert (whole[:, :, :, shape[3] :] == LOWEST).all()


@both_generations
@pytest.mark.parametrize(("num_queries", "phase"), [(128, "prefill"), (1, "decode")])
def test_statistics_have_the_names_and_types_of_their_generation(config, num_queries, phase):
    scores = torch.randn(1, 1, num_queries, 256)
    mask, stats = FlashSkipSoftmax(config).calc_correction_factor_and_p(scores, phase)
    assert set(stats) == {
        *("correction_factor", "sparsity", "phase"),
        *("total_blocks", "sparse_blocks", "sample_length"),
    }
    assert (stats["phase"], stats["sample_length"]) == (phase, 256)
    assert 0 <= stats["correction_factor"] <= 1
    kind = list if "thresholds" in config else (int, float)
    assert isinstance(stats["sparsity"], kind)
    assert isinstance(stats["sparse_blocks"], kind)
    numbers = as_numbers(stats)
    assert -1 <= numbers["sparsity"] <= 1
    assert type(numbers["sparse_blocks"]) is int
    assert (mask.shape, mask.dtype, mask.device) == (scores.shape, torch.bool, scores.device)


@both_generations
@pytest.mark.parametrize(("is_causal", "total"), [(True, 3), (False, 4)])
def test_only_a_causal_method_leaves_out_the_blocks_above_the_diagonal(config, is_causal, total):
    method = FlashSkipSoftmax({**config, "is_causal": is_causal})
    _, stats = method.calc_correction_factor_and_p(torch.randn(1, 1, 256, 256), "prefill")
    assert stats["total_blocks"] == total


@both_generations
def test_scores_that_are_not_4d_fail_an_assertion(config):
    with pytest.raises(AssertionError, match="Expected 4D"):
        FlashSkipSoftmax(config).calculate_sparsity(attention_scores=torch.randn(2, 64, 64))


@both_generations
def test_what_is_not_kept_gets_the_lowest_value(config):
    method, scores = FlashSkipSoftmax(config), uneven(256, 512)
    mask, _ = method.calculate_sparsity(scores)
    sparse = method.apply_sparsity(scores, mask)
    assert 0 < int((~mask).sum()) < mask.numel()
    assert (sparse[~mask] == LOWEST).all()
    assert torch.equal(sparse[mask], scores[mask])
    assert torch.equal(method.apply_sparsity(scores), sparse)


@both_generations
@pytest.mark.parametrize(("num_queries", "phase"), [(128, "prefill"), (1, "decode")])
def test_a_calibrated_phase_computes_its_threshold_from_the_length(config, num_queries, phase):
    method = FlashSkipSoftmax({**config, "is_causal": False})
    scores = gaussian(1, 2, num_queries, 256) * 5
    method.calibration_params = {phase: {"a": 1.0, "b": 5.0}}
    method.target_sparse_ratio = {phase: 0.5}
    mask, stats = method.calc_correction_factor_and_p(scores, phase)
    by_hand = math.exp(2.5) / 256
    static = FlashSkipSoftmax(
        {"threshold": {"prefill": by_hand, "decode": by_hand}, "is_causal": False}
    )
    expected_mask, expected = static.calculate_sparsity(scores)
    assert torch.equal(mask, expected_mask)
    assert as_numbers(stats) == expected
    assert isinstance(stats["sparsity"], list) == ("thresholds" in config)


@both_generations
def test_static_thresholds_are_described_as_configured(config):
    value = config.get("threshold", config.get("thresholds"))
    info = FlashSkipSoftmax(method_config=config).get_threshold_info()
    assert info == {"type": "static", "value": value}


@both_generations
def test_calibrated_thresholds_are_described_with_formula_and_examples(config):
    method = FlashSkipSoftmax(method_config=config)
    params = {"prefill": {"a": 150.0, "b": 1.5}, "decode": {"a": 200.0, "b": 1.8}}
    method.calibration_params = params
    method.target_sparse_ratio = {"prefill": 0.9}
    info = method.get_threshold_info()
    assert info["type"] == "dynamic_calibrated"
    assert info["formula"] == "threshold = a * exp(b * target_sparsity) / seqlen"
    assert info["calibration_params"] == params
    assert info["target_sparse_ratio"] == {"prefill": 0.9}
    scale = 150.0 * math.exp(1.5 * 0.9)
    lengths = (1024, 4096, 16384, 65536, 131072)
    assert info["phases"]["prefill"] == {
        "a": 150.0,
        "b": 1.5,
        "target_sparsity": 0.9,
        "scale_factor": scale,
        "example_thresholds": {length: scale / length for length in lengths},
    }
    assert info["phases"]["decode"]["target_sparsity"] == 0.5


@both_generations
def test_the_sparse_context_patches_softmax_and_puts_it_back(config):
    method, module = FlashSkipSoftmax(config), SimpleNamespace(_last_stats=None)
    dense_softmax, scores = functional.softmax, uneven(256, 256)
    with method.get_sparse_context(module):
        assert functional.softmax is not dense_softmax
        weights = functional.softmax(scores, dim=-1, dtype=torch.float64)
    assert functional.softmax is dense_softmax
    mask, stats = method.calculate_sparsity(scores)
    assert module._last_stats == stats
    assert weights.dtype is torch.float64
    assert (weights[~mask] == 0).all()
    assert int((~mask).sum()) > 0


def test_softmax_is_put_back_after_a_failure_too():
    dense_softmax = functional.softmax
    with (
        pytest.raises(AssertionError, match="Expected 4D"),
        FlashSkipSoftmax().get_sparse_context(SimpleNamespace()),
    ):
        functional.softmax(torch.randn(3, 3), dim=-1)
    assert functional.softmax is dense_softmax


def test_while_calibrating_nothing_is_masked_and_assigned_thresholds_stay():
    method, module, scores = FlashSkipSoftmax(LISTS), SimpleNamespace(), uneven(256, 256)
    method.set_calibration_mode(True)
    method.thresholds = [1e-6, 1e-3, 0.5]
    with method.get_sparse_context(module):
        assert torch.equal(functional.softmax(scores, dim=-1), scores.softmax(-1))
    assert method.thresholds == [1e-6, 1e-3, 0.5]
    shares = module._last_stats["sparsity"]
    assert len(shares) == 3
    assert shares == sorted(shares)
    assert shares[0] < shares[2]
    method.set_calibration_mode(False)
    method.calculate_sparsity(scores)
    assert method.thresholds == [1e-3]


def test_a_trial_threshold_of_the_first_generation_is_a_number():
    method = FlashSkipSoftmax(SCALAR)
    method.set_calibration_mode(True)
    method.threshold = 0.5
    _, stats = method.calculate_sparsity(uneven(256, 256))
    assert isinstance(stats["sparsity"], float)
    assert method.thresholds == [0.5]


@pytest.mark.parametrize(
    ("num_queries", "num_keys", "block_rows", "block_keys"),
    [(16, 16, 4, 4), (13, 13, 4, 4), (6, 17, 4, 4), (1, 19, 4, 4), (12, 24, 4, 8), (16, 16, 8, 2)],
)
@pytest.mark.parametrize("threshold", [1e-4, 0.03, 0.9])
def test_blocks_are_kept_as_plain_loops_keep_them(
    num_queries, num_keys, block_rows, block_keys, threshold
):
    scores = uneven(num_queries, num_keys, seed=num_keys, size=2)
    config = {"prefill": threshold, "decode": threshold}
    method = FlashSkipSoftmax({"threshold": config, "br": block_rows, "bc": block_keys})
    mask, _ = method.calculate_sparsity(scores)
    rows = 1 if num_queries == 1 else block_rows
    for batch in range(2):
        for head in range(3):
            kept = oracle(scores[batch, head], rows, block_keys, threshold)
            elements = kept.repeat_interleave(rows, 0).repeat_interleave(block_keys, 1)
            assert torch.equal(mask[batch, head], elements[:num_queries, :num_keys])


def test_both_spellings_decide_and_count_alike():
    scores = uneven(500, 900)
    (mask, stats), (list_mask, list_stats) = (
        FlashSkipSoftmax(config).calculate_sparsity(scores) for config in (SCALAR, LISTS)
    )
    assert torch.equal(mask, list_mask)
    assert stats == as_numbers(list_stats)
    assert isinstance(list_stats["sparsity"], list)


def test_the_first_of_several_thresholds_decides_and_all_are_counted():
    scores, values = uneven(512, 512), [1e-2, 1e-6, 0.5]
    mask, stats = FlashSkipSoftmax({"thresholds": {"prefill": values}}).calculate_sparsity(scores)
    alone = [
        FlashSkipSoftmax({"threshold": {"prefill": v}}).calculate_sparsity(scores) for v in values
    ]
    assert torch.equal(mask, alone[0][0])
    assert stats["sparsity"] == [single["sparsity"] for _, single in alone]
    assert stats["sparse_blocks"] == [single["sparse_blocks"] for _, single in alone]
    assert len(set(stats["sparsity"])) == 3


@pytest.mark.parametrize(
    ("num_queries", "digest", "stats"),
    [
        (1000, "39d02aac567afb48", ("prefill", 0.2530721127986908, 0.1620370370370371, 36, 5)),
        (1, "d003ee8ed2f4242d", ("decode", 0.3333333432674408, 0.33333333333333337, 8, 2)),
    ],
)
def test_decisions_are_frozen(num_queries, digest, stats):
    """A change here is a change of a released version: make it a new one instead."""
    mask, got = FlashSkipSoftmax().calculate_sparsity(uneven(num_queries, 1000))
    assert hashlib.sha256(np.packbits(mask.numpy()).tobytes()).hexdigest()[:16] == digest
    names = ("phase", "correction_factor", "sparsity", "total_blocks", "sparse_blocks")
    assert tuple(got[name] for name in names) == stats
