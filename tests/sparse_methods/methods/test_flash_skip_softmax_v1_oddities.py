"""What a released version does and one might not expect, as numbers; it must go on doing so."""

import math

import pytest
import torch

from sparse_methods.methods.flash_skip_softmax_v1 import FlashSkipSoftmax
from tests.sparse_methods.methods.flash_skip_scores import (
    LOWEST,
    gaussian,
    sink_and_diagonal,
)


def test_padded_query_rows_keep_every_block_of_the_last_row():
    _, aligned = FlashSkipSoftmax().calculate_sparsity(sink_and_diagonal(1024, 1024))
    mask, padded = FlashSkipSoftmax().calculate_sparsity(sink_and_diagonal(1000, 1000))
    assert aligned["total_blocks"] == padded["total_blocks"] == 36
    assert aligned["sparsity"] == pytest.approx(1 - 15 / 36)  # 0.583, the exact value
    assert padded["sparsity"] == pytest.approx(1 - 21 / 36)  # 0.417: 8 blocks instead of 2
    assert mask[..., 896:, :].all()


@pytest.mark.parametrize(
    ("br", "bc", "total", "sparsity"), [(64, 128, 8, -2.75), (128, 64, 100, 0.7)]
)
def test_the_causal_total_assumes_square_blocks(br, bc, total, sparsity):
    method = FlashSkipSoftmax({"br": br, "bc": bc})
    _, stats = method.calculate_sparsity(sink_and_diagonal(1024, 1024))
    assert stats["total_blocks"] == total  # 72 in truth, both ways
    assert stats["sparsity"] == pytest.approx(sparsity)


def test_the_causal_total_assumes_an_aligned_prefix():
    _, stats = FlashSkipSoftmax().calculate_sparsity(sink_and_diagonal(130, 230))
    assert stats["total_blocks"] == 3  # 4 in truth


def test_scores_without_the_causal_mask_give_a_negative_sparsity():
    _, stats = FlashSkipSoftmax().calculate_sparsity(gaussian(1, 1, 256, 256))
    assert stats["sparsity"] == pytest.approx(-1 / 3)  # 4 kept of 3
    assert stats["sparse_blocks"] == 0


def test_rows_of_left_padding_keep_every_block():
    scores = sink_and_diagonal(512, 512)
    scores[..., :128, :] = LOWEST
    scores[..., :128] = LOWEST
    mask, stats = FlashSkipSoftmax().calculate_sparsity(scores)
    assert mask[..., :128, :].all()
    assert stats["sparsity"] == pytest.approx(-0.3)  # 4 + 2 + 3 + 4 kept of 10


def test_a_calibrated_threshold_of_1_or_more_drops_everything_even_the_first_block():
    method = FlashSkipSoftmax()
    method.calibration_params = {"prefill": {"a": 7.906, "b": 8.615}}
    method.target_sparse_ratio = {"prefill": 0.5}
    mask, stats = method.calculate_sparsity(sink_and_diagonal(512, 512))
    assert not mask.any()
    assert (stats["sparsity"], stats["sparse_blocks"]) == (1.0, 10)


def test_the_number_of_sparse_blocks_is_truncated():
    scores = torch.zeros(1, 5, 1, 512)
    scores[..., :128] = 20.0
    scores[0, 1:, 0, 128:] = 20.0  # only head 0 skips: 3 of its 4 blocks, 3 of 20 in all
    _, stats = FlashSkipSoftmax().calculate_sparsity(scores)
    assert stats["sparsity"] == pytest.approx(0.15)
    assert (stats["total_blocks"], stats["sparse_blocks"]) == (4, 0)


def test_the_total_is_that_of_one_head():
    _, stats = FlashSkipSoftmax().calculate_sparsity(sink_and_diagonal(512, 512).repeat(2, 3, 1, 1))
    assert (stats["total_blocks"], stats["sparse_blocks"]) == (10, 3)


def test_the_correction_factor_counts_strict_rises_with_padding_in_its_denominator():
    scores = torch.zeros(1, 1, 1, 400)
    scores[..., 128:256] = 1.0
    scores[..., 384:] = 2.0
    _, stats = FlashSkipSoftmax({"bc": 128}).calculate_sparsity(scores)
    assert stats["correction_factor"] == 0.75
    _, stats = FlashSkipSoftmax().calculate_sparsity(torch.zeros(1, 1, 2, 512))
    assert stats["correction_factor"] == 0.25


def test_a_block_exactly_at_the_threshold_is_dropped():
    scores = torch.zeros(1, 1, 1, 256)
    scores[..., 128:] = math.log(0.5)
    mask, _ = FlashSkipSoftmax({"threshold": {"decode": 0.5}}).calculate_sparsity(scores)
    assert mask[..., :128].all()
    assert not mask[..., 128:].any()


def test_the_scores_own_dtype_decides_without_an_upcast():
    scores = torch.zeros(1, 1, 2, 256, dtype=torch.bfloat16)
    scores[..., 128:] = -6.90625  # ln 1e-3 is -6.9078, which bfloat16 rounds to this
    method = FlashSkipSoftmax({"br": 2})
    assert not method.calculate_sparsity(scores)[0][..., 128:].any()
    assert method.calculate_sparsity(scores.float())[0].all()


def test_a_phase_without_a_threshold_keeps_that_of_the_phase_before():
    method = FlashSkipSoftmax({"threshold": {"decode": 0.25}})
    assert method.threshold == 1e-3
    method.calculate_sparsity(torch.zeros(1, 1, 1, 4))
    method.calculate_sparsity(torch.zeros(1, 1, 4, 4))
    assert method.threshold == 0.25
