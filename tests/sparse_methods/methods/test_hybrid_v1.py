import pytest
import torch

from sparse_methods import (
    InvalidKnobsError,
    Phase,
    UnsupportedError,
    get_sparse_method,
    list_sparse_methods,
)
from sparse_methods.calibration.artifact import MethodCalibration
from sparse_methods.methods.hybrid_v1 import Hybrid
from tests.sparse_methods import paged

SKIPS = {"threshold": {"prefill": 0.1, "decode": 0.2}}


def prompt() -> tuple[torch.Tensor, torch.Tensor]:
    """[T, Hq, D] queries and [T, Hkv, D] keys."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(640, 2, 8, generator=generator)
    return torch.randn(640, 4, 8, generator=generator), keys


def assert_same(given, expected):
    assert torch.equal(given.indices, expected.indices)
    assert torch.equal(given.counts, expected.counts)


@pytest.mark.parametrize(
    ("decode", "params"), [("quest", {"budget_pages": 3}), ("snapkv", {"budget_pages": 2})]
)
def test_each_phase_is_decided_by_its_own_method(decode, params):
    first = {"window_blocks": 2}
    hybrid = Hybrid(
        {
            "prefill": "streaming",
            "prefill_params": first,
            "decode": decode,
            "decode_params": params,
        }
    )
    second = get_sparse_method(decode)(params)
    query, keys = prompt()
    whole = paged.prefill_view(query, keys, block_size=16)
    assert_same(
        hybrid.select_prefill(whole), get_sparse_method("streaming")(first).select_prefill(whole)
    )
    scores = hybrid.score_pages(whole)
    assert (scores is None) == (decode == "quest")
    if scores is not None:
        torch.testing.assert_close(scores, second.score_pages(whole), rtol=0, atol=0)
        scores = scores[None]
    row = paged.decode_view(query[-1:], keys, [640], page_size=16, page_scores=scores)
    chosen = hybrid.select_decode(row)
    assert_same(chosen, second.select_decode(row))
    assert chosen is not None
    assert 0 < chosen.counts[0, 0] < 40


def test_thresholds_and_visiting_order_are_the_halves_own():
    hybrid = Hybrid(
        {"decode": "flash_skip_softmax", "decode_version": "v1", "decode_params": SKIPS}
    )
    assert hybrid.skip_threshold(Phase.PREFILL, 1000) is None
    assert hybrid.skip_threshold(Phase.DECODE, 1000) == 0.2
    assert not hybrid.visits_diagonal_first(Phase.DECODE)
    info = hybrid.get_threshold_info()
    assert info["type"] == info["decode"]["type"] == "static"
    assert info["prefill"]["type"] == "none"
    latest = Hybrid({"prefill": "flash_skip_softmax"})
    half = get_sparse_method("flash_skip_softmax")()
    assert latest.visits_diagonal_first(Phase.PREFILL) == half.visits_diagonal_first(Phase.PREFILL)
    assert not latest.visits_diagonal_first(Phase.DECODE)


def test_masks_are_the_halves_own():
    generator = torch.Generator().manual_seed(0)
    for num_queries, half in ((640, "xattention"), (1, "quest")):
        scores = torch.randn(1, 1, num_queries, 640, generator=generator)
        mask, stats = Hybrid().calculate_sparsity(scores)
        expected, expected_stats = get_sparse_method(half)().calculate_sparsity(scores)
        assert torch.equal(mask, expected)
        assert stats == expected_stats


def test_each_half_has_its_own_break_even_length():
    hybrid = Hybrid(
        {"prefill_params": {"dense_below": 100}, "decode_params": {"dense_below": 1000}}
    )
    assert hybrid.break_even(Phase.PREFILL) == 100
    assert hybrid.break_even(Phase.DECODE) == 1000
    assert hybrid.fallback(1000) is None
    assert hybrid.fallback(999, 1000) is None, "the decoding half came into force"
    fallback = hybrid.fallback(999)
    assert fallback is not None
    assert fallback.to == "dense"
    assert fallback.reason.startswith("decode: ")
    assert "'decode_params.dense_below'" in fallback.reason
    both = hybrid.fallback(99)
    assert both is not None
    assert "prefill: " in both.reason
    assert "decode: " in both.reason


def test_a_decoding_half_goes_by_the_context_also_if_it_knows_both_phases():
    hybrid = Hybrid(
        {"prefill": "dense", "decode": "streaming", "decode_params": {"dense_below": 100}}
    )
    assert hybrid.fallback(90, 100) is None, "its last row was sparse"
    fallback = hybrid.fallback(90, 99)
    assert fallback is not None
    assert fallback.reason.startswith("decode: The context grew to 99 tokens")
    both = Hybrid({"prefill": "streaming", "prefill_params": {"dense_below": 100}})
    prompt_alone = both.fallback(90, 20_000)
    assert prompt_alone is not None, "what the prompt fell back to stays so"
    assert prompt_alone.reason.startswith("prefill: The prompt has 90 tokens")


def test_a_half_without_a_phase_of_its_own_may_be_dense():
    query, keys = prompt()
    hybrid = Hybrid({"prefill": "dense"})
    assert hybrid.select_prefill(paged.prefill_view(query, keys)) is None
    assert Hybrid({"prefill": "dense", "decode": "dense"}).fallback(1) is None


def serves(phase: str) -> list[str]:
    classes = [get_sparse_method(name) for name in list_sparse_methods()]
    return [
        cls.registered_name
        for cls in classes
        if (not cls.phases or phase in cls.phases)
        and not cls.evaluation_only
        and cls.registered_name != "hybrid"
    ]


@pytest.mark.parametrize(
    ("knob", "name"),
    [
        ("prefill", "hybrid"),
        ("decode", "hybrid"),
        ("prefill", "quest"),
        ("prefill", "snapkv"),
        *(
            ("decode", name)
            for name in list_sparse_methods()
            if get_sparse_method(name).evaluation_only
        ),
    ],
)
def test_a_method_that_cannot_be_this_half_is_refused_with_those_that_can(knob, name):
    with pytest.raises(InvalidKnobsError, match=f"'{name}' cannot be the {knob}") as caught:
        Hybrid({knob: name})
    assert caught.value.knob == knob
    assert str(serves(knob)) in str(caught.value)


@pytest.mark.parametrize(
    ("knobs", "knob", "words"),
    [
        ({"decode": "qest"}, "decode", "Did you mean 'quest'"),
        ({"decode_version": "v99"}, "decode_version", "Available versions"),
        ({"prefill_params": {"sinks": 1}}, "prefill_params.sinks", "stride"),
        ({"decode_params": {"budget_pages": 0}}, "decode_params.budget_pages", "budget_pages"),
        ({"decode_params": []}, "decode_params", "decode_params"),
        ({"prefill": 5}, "prefill", "prefill"),
    ],
)
def test_an_error_names_the_knob_at_fault_and_what_there_is(knobs, knob, words):
    with pytest.raises(InvalidKnobsError, match=words) as caught:
        Hybrid(knobs)
    assert caught.value.knob == knob


def test_what_a_half_cannot_serve_the_whole_cannot():
    hybrid = Hybrid({"prefill": "flash_skip_softmax", "prefill_params": {"target_sparsity": 0.5}})
    with pytest.raises(UnsupportedError, match="calibration"):
        hybrid.check_servable(128)


def test_a_calibration_reaches_the_half_it_is_of():
    cls = get_sparse_method("flash_skip_softmax")
    calibration = MethodCalibration(
        method=cls.registered_name, version=cls.registered_version, block_size=128, phases={}
    )
    other = calibration.model_copy(update={"version": "v0"})
    hybrid = Hybrid({"prefill": "flash_skip_softmax"})
    bound = hybrid.with_calibration(calibration)
    assert bound != hybrid, "what they keep differs as soon as a target is set"
    assert bound == Hybrid({"prefill": "flash_skip_softmax"}).with_calibration(calibration)
    assert hybrid.with_calibration(other) == hybrid
    given = [vars(h.halves[Phase.PREFILL])["calibration"] for h in (bound, hybrid)]
    assert given == [calibration, None]
    unbound = hybrid.with_calibration(other).halves[Phase.PREFILL]
    assert vars(unbound)["calibration"] is None


def test_the_order_of_a_halfs_knobs_does_not_matter():
    knobs = {"budget_pages": 4, "top_p": 0.5}
    one = Hybrid({"decode": "quest", "decode_params": knobs})
    other = Hybrid({"decode": "quest", "decode_params": dict(reversed(knobs.items()))})
    assert one == other
    assert hash(one) == hash(other)
    assert hash(one) != hash(
        Hybrid({"decode": "quest", "decode_params": {**knobs, "budget_pages": 5}})
    )
