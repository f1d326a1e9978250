"""Names of prompt pages: equal only where keys and values are."""

import pytest
import torch
from typing_extensions import override

from service.engine.prefix import PrefixKeys
from sparse_methods import Phase, get_sparse_method
from sparse_methods.calibration.artifact import Fit, MethodCalibration, PhaseCalibration
from sparse_methods.methods.dense_v1 import Dense
from sparse_methods.methods.flash_skip_softmax_v2 import FlashSkipSoftmax

TOKENS = list(range(100, 140))


def method(name="dense", **knobs):
    return get_sparse_method(name)(knobs)


def keys(prompt_ids=TOKENS, of=None, salt=None, **settings):
    prefix = PrefixKeys(prompt_ids, 8, of or method(), salt, **settings)
    return [prefix.key(page) for page in range(prefix.num_pages)]


def test_a_key_names_all_tokens_up_to_the_end_of_its_page():
    assert len(keys()) == len(set(keys())) == 5
    changed = keys([*TOKENS[:17], 1, *TOKENS[18:]])
    assert changed[:2] == keys()[:2]
    assert not set(changed[2:]) & set(keys())
    assert keys(TOKENS[8:])[0] != keys()[0]
    assert keys(TOKENS[:30]) == keys()[:3]


def test_keys_differ_by_salt_method_and_every_knob():
    skip = "flash_skip_softmax"
    others = [
        keys(salt="a"),
        keys(salt="b"),
        keys(of=method(skip)),
        keys(of=method(skip, prefill_threshold=0.2)),
        keys(of=method(skip, decode_threshold=0.2)),
    ]
    assert len({one[0] for one in [keys(), *others]}) == 6
    assert keys(of=method(skip)) == keys(of=method(skip))


def test_the_last_token_is_never_reused_and_opting_out_reuses_nothing():
    for length, expected in ((1, 0), (8, 0), (9, 1), (16, 1), (17, 2)):
        assert PrefixKeys(TOKENS[:length], 8, method()).num_reusable == expected
    opted_out = PrefixKeys(TOKENS, 8, method(), may_reuse=False)
    assert (opted_out.num_reusable, opted_out.num_pages) == (0, 5)


@pytest.mark.parametrize(("window", "expected"), [(1, 4), (8, 4), (9, 3), (1000, 0)])
def test_rows_that_rank_pages_are_computed_for_every_request(window, expected):
    for one in (
        method("snapkv", window=window),
        method("hybrid", prefill="dense", decode="snapkv", decode_params={"window": window}),
    ):
        assert PrefixKeys(TOKENS, 8, one).num_reusable == expected


class ScoresEverything(Dense):
    @override
    def score_pages(self, view):
        return torch.zeros(1, 1)


class FollowsTheLength(Dense):
    phases = (Phase.PREFILL,)

    @override
    def skip_threshold(self, phase, kv_len):
        return 1 / kv_len


def test_a_method_that_scores_pages_and_says_no_more_reuses_nothing():
    assert PrefixKeys(TOKENS, 8, ScoresEverything()).num_reusable == 0


def test_prompts_share_only_what_does_not_depend_on_their_length():
    assert keys(TOKENS[:30], FollowsTheLength())[0] != keys(TOKENS, FollowsTheLength())[0]
    skip = method("flash_skip_softmax", dense_below=35)
    assert keys(TOKENS[:34], skip)[0] != keys(TOKENS, skip)[0]
    assert keys(TOKENS[:36], skip)[0] == keys(TOKENS, skip)[0]
    assert keys(TOKENS[:33], skip)[0] == keys(TOKENS[:34], skip)[0]


def calibrated(a, **knobs):
    fit = Fit(a=a, b=8.0, p=0.5, r_squared=1.0, min_sparsity=0.1, max_sparsity=0.9, num_points=3)
    phases = {Phase.PREFILL: PhaseCalibration(layers=(fit,))}
    calibration = MethodCalibration(
        method="flash_skip_softmax", version="v2", block_size=8, phases=phases
    )
    return FlashSkipSoftmax(knobs).with_calibration(calibration)


def test_a_target_is_corrected_by_length_and_calibrations_are_told_apart():
    target = calibrated(0.5, target_sparsity=0.5)
    assert keys(TOKENS[:30], target)[0] != keys(TOKENS, target)[0]
    assert keys(TOKENS[:30], calibrated(0.5))[0] == keys(TOKENS, calibrated(0.5))[0]
    assert keys(of=target)[0] == keys(of=calibrated(0.5, target_sparsity=0.5))[0]
    assert keys(of=target)[0] != keys(of=calibrated(0.6, target_sparsity=0.5))[0]
