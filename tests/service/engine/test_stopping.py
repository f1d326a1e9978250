from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.sequence import FinishReason, SamplingParams
from service.engine.stopping import Ending, OutputBuilder, StopChecker
from service.engine.tokenizer import TextStream, Tokenizer

EOS = 1
TOKENIZER_FILE = Path(__file__).parents[3] / "service" / "default_model" / "tokenizer.json"
TOKENIZER = Tokenizer(tokenizers.Tokenizer.from_file(str(TOKENIZER_FILE)), {EOS})
ID_OF = {TOKENIZER.token_bytes(i): i for i in range(TOKENIZER.vocab_size)}
A, B, E_ACUTE_1, E_ACUTE_2, ING = (ID_OF[b] for b in (b"a", b"b", b"\xc3", b"\xa9", b"ing"))


def build(
    sampling: SamplingParams, ids: list[int], prompt_ids: list[int] | None = None
) -> tuple[list[str], Ending | None]:
    """Push tokens until one ends the generation; the texts shown and the ending."""
    builder = OutputBuilder(TOKENIZER, prompt_ids or [], sampling)
    shown = []
    for token_id in ids:
        text, ending = builder.push(token_id)
        shown.append(text)
        if ending is not None:
            return shown, ending
    return shown, None


def ending_by_token(sampling: SamplingParams, num_tokens: int, token_id: int) -> Ending | None:
    if num_tokens > sampling.min_tokens:
        if token_id == EOS and not sampling.ignore_eos:
            return Ending(FinishReason.STOP)
        if token_id in sampling.stop_token_ids:
            return Ending(FinishReason.STOP, token_id)
    return Ending(FinishReason.LENGTH) if num_tokens == sampling.max_tokens else None


def expected_output(sampling: SamplingParams, ids: list[int]) -> tuple[str, Ending | None]:
    """The rules, character by character on the text so far."""
    stream = TextStream(TOKENIZER, [])
    text = ""
    for num_tokens, token_id in enumerate(ids, start=1):
        ending = ending_by_token(sampling, num_tokens, token_id)
        is_stop = ending is not None and ending.reason is FinishReason.STOP
        new = "" if is_stop else stream.push([token_id])
        new += stream.finish() if ending else ""
        for character in new:
            text += character
            ends = [stop for stop in sampling.stop if text.endswith(stop)]
            if ends and num_tokens > sampling.min_tokens:
                longest = max(ends, key=len)
                return text.removesuffix(longest), Ending(FinishReason.STOP, longest)
        if ending:
            return text, ending
    return text, None


samplings = st.builds(
    SamplingParams,
    max_tokens=st.integers(8, 20),
    min_tokens=st.integers(0, 8),
    stop=st.lists(st.text("abéing\ufffd", min_size=1, max_size=4), max_size=3).map(tuple),
    stop_token_ids=st.sampled_from([(), (B,), (EOS,)]),
    ignore_eos=st.booleans(),
)


@settings(max_examples=500)
@given(
    samplings,
    st.lists(st.sampled_from([A, A, B, B, ING, E_ACUTE_1, E_ACUTE_2, EOS, 2**40]), max_size=20),
)
def test_output_and_ending_are_those_of_a_search_character_by_character(sampling, ids):
    shown, ending = build(sampling, ids)
    text, expected_ending = expected_output(sampling, ids)
    assert ending == expected_ending
    if ending:
        assert "".join(shown) == text
    else:  # the rest is held back
        num_held = max(map(len, sampling.stop), default=1) - 1
        assert "".join(shown) == text[: max(0, len(text) - num_held)]


def test_text_flows_at_once_when_there_is_no_stop_string():
    assert build(SamplingParams(), [A, B, ING]) == (["a", "b", "ing"], None)


def test_no_more_is_held_back_than_could_begin_a_stop_string():
    assert build(SamplingParams(stop=("xyz", "q")), [A, B, ING]) == (["", "", "abi"], None)


def test_the_stop_string_that_ends_first_wins_and_is_not_shown():
    sampling = SamplingParams(stop=("abinga", "bin", "in"))
    assert build(sampling, [A, B, ING, A]) == (
        ["", "", "a"],
        Ending(FinishReason.STOP, "bin"),
    )


def test_a_stop_string_may_begin_in_one_token_and_end_in_the_middle_of_another():
    assert build(SamplingParams(stop=("bi",)), [A, B, ING]) == (
        ["", "a", ""],
        Ending(FinishReason.STOP, "bi"),
    )


def test_the_end_of_sequence_shows_what_was_held_back_but_not_itself():
    assert build(SamplingParams(stop=("bbb",)), [A, B, EOS]) == (
        ["", "", "ab"],
        Ending(FinishReason.STOP),
    )


def test_a_stop_token_has_no_text_and_is_the_reason():
    sampling = SamplingParams(stop_token_ids=(B,))
    assert build(sampling, [A, B]) == (["a", ""], Ending(FinishReason.STOP, B))


def test_an_ignored_end_of_sequence_goes_on_unless_it_is_a_stop_token_too():
    ids = [A, EOS, B]
    assert build(SamplingParams(ignore_eos=True), ids) == (["a", "", "b"], None)
    sampling = SamplingParams(ignore_eos=True, stop_token_ids=(EOS,))
    assert build(sampling, ids)[1] == Ending(FinishReason.STOP, EOS)


def test_the_last_token_allowed_is_shown_whole():
    sampling = SamplingParams(max_tokens=2, stop=("xxxxxx",))
    assert build(sampling, [A, ING]) == (["", "aing"], Ending(FinishReason.LENGTH))


def test_an_end_of_sequence_as_the_last_token_allowed_is_a_stop():
    assert build(SamplingParams(max_tokens=1), [EOS])[1] == Ending(FinishReason.STOP)


@pytest.mark.parametrize(
    ("ids", "max_tokens"), [([A, E_ACUTE_1, EOS], 9), ([A, E_ACUTE_1], 2)], ids=["eos", "length"]
)
def test_a_stop_string_that_only_the_flushed_tail_completes_counts(ids, max_tokens):
    sampling = SamplingParams(max_tokens=max_tokens, stop=("a\ufffd",))
    shown, ending = build(sampling, ids)
    assert "".join(shown) == ""
    assert ending == Ending(FinishReason.STOP, "a\ufffd")


def test_no_stop_rule_holds_before_the_minimum_length():
    sampling = SamplingParams(min_tokens=3, stop=("a",), stop_token_ids=(B,))
    shown, ending = build(sampling, [A, EOS, B, B])
    assert "".join(shown) == "ab"
    assert ending == Ending(FinishReason.STOP, B)


def test_a_stop_string_counts_if_it_ends_behind_the_minimum_length_wherever_it_began():
    sampling = SamplingParams(min_tokens=2, stop=("abab",))
    shown, ending = build(sampling, [A, B, A, B])
    assert "".join(shown) == ""
    assert ending == Ending(FinishReason.STOP, "abab")


def test_a_character_the_prompt_began_counts_for_stop_strings():
    shown, ending = build(SamplingParams(stop=("éa",)), [E_ACUTE_2, A], prompt_ids=[B, E_ACUTE_1])
    assert "".join(shown) == ""
    assert ending == Ending(FinishReason.STOP, "éa")


def test_an_aborted_generation_shows_what_was_held_back():
    builder = OutputBuilder(TOKENIZER, [], SamplingParams(stop=("abc", "b\ufffd")))
    assert builder.push(A) == ("", None)
    assert builder.push(E_ACUTE_1) == ("", None)
    assert builder.abort() == "a\ufffd"
    assert builder.abort() == ""


def test_an_aborted_generation_shows_no_stop_string():
    builder = OutputBuilder(TOKENIZER, [], SamplingParams(stop=("b\ufffd",)))
    texts = [builder.push(token_id)[0] for token_id in (A, B, E_ACUTE_1)]
    assert "".join([*texts, builder.abort()]) == "a"


def test_an_empty_stop_string_stops_nothing():
    checker = StopChecker(SamplingParams(stop=("",)), frozenset())
    assert checker.check_token(A) is None
    assert checker.check_text("a") == ("a", None)
