"""Divergence from dense against distributions whose answer is known."""

import math

import pytest
import torch

from sparse_methods.evaluation.agreement import WindowScores, text_measures

P, Q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.5, 0.25])
KL = 0.5 * math.log(2) - 0.25 * math.log(2)


def scored(distributions, targets, num_decoded=2, cut=3):
    """A window whose rows have these probabilities, added in two chunks."""
    window = WindowScores(len(distributions), num_decoded)
    logits = torch.stack(distributions).log() + 7.0  # logits are free up to a constant
    window.add(logits[:cut], 0, torch.tensor(targets[:cut]))
    window.add(logits[cut:], cut, torch.tensor(targets[cut:]))
    return window


def test_measures_are_those_of_the_definitions():
    dense = scored([P] * 6, [0] * 6)
    ours = scored([P, Q, P, P, Q, P], [0] * 6)
    found = text_measures(ours, dense, bytes_per_token=2.0)
    assert found["bits_per_byte"] == pytest.approx((3 * 1 + 2) / 4 / 2)
    assert found["bits_per_byte_change_percent"] == pytest.approx(25, abs=1e-3)
    assert found["kl"] == pytest.approx(KL / 4, abs=1e-6)
    assert found["top1"] == pytest.approx(3 / 4)
    assert found["decode_bits_per_byte"] == pytest.approx(1.5 / 2)
    assert found["decode_kl"] == pytest.approx(KL / 2, abs=1e-6)
    assert found["decode_top1"] == pytest.approx(0.5)


def test_dense_differs_from_itself_in_nothing():
    dense = scored([P, Q] * 3, [1] * 6)
    found = text_measures(dense, dense, 1.0)
    assert found["kl"] == found["decode_kl"] == 0.0
    assert found["top1"] == found["decode_top1"] == 1.0
    assert found["bits_per_byte_change_percent"] == 0.0


def test_of_a_long_prompt_few_distributions_are_kept_but_every_decoded_one():
    window = WindowScores(2000, 10)
    logits = torch.randn(2000, 5, generator=torch.Generator().manual_seed(0))
    for start in range(0, 2000, 512):
        chunk = logits[start : start + 512]
        window.add(chunk, start, torch.zeros(len(chunk), dtype=torch.int64))
    joined = window.joined()
    assert len(joined.bits) == len(joined.choices) == 2000
    assert 200 < len(joined.log_probs) < 600
    assert torch.equal(joined.log_probs[-10:], torch.log_softmax(logits[-10:], -1))
