"""What prompts may take of a step; how it is dealt out is in test_scheduler.py."""

import math
import sys

import pytest

from service.engine.prompt_shares import PromptShares
from tests.service.engine.stepping import BLOCK, sequence_of, tokens_of


def test_what_fits_beside_decoding_follows_the_pace():
    shares = PromptShares(8, 0.1)
    assert shares.tokens_beside_decoding == sys.maxsize, "nothing is known yet"
    shares.note_pace(1000, 1.0)
    assert shares.tokens_beside_decoding == 100
    shares.note_pace(2000, 1.0)
    assert shares.tokens_beside_decoding == 130
    shares.note_pace(1, 60.0)  # as when something compiles
    assert shares.tokens_beside_decoding == 91
    for _ in range(40):
        shares.note_pace(1, 60.0)
    assert shares.tokens_beside_decoding == 8
    unbounded = PromptShares(8, math.inf)
    unbounded.note_pace(1, 60.0)
    assert unbounded.tokens_beside_decoding == sys.maxsize


def test_the_oldest_has_half_or_every_other_step():
    shares = PromptShares(8, 0.1)
    assert [shares.share_of_oldest(budget) for budget in (64, 16)] == [32, 8]
    assert [shares.share_of_oldest(15) for _ in range(4)] == [15, 0, 15, 0]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"num_computed_tokens": 3 * BLOCK}, True),
        ({"num_computed_tokens": 4 * BLOCK}, False),  # it is past that page
        ({"priority": 1}, False),  # the other would wait for somebody less urgent
        ({"prefix": None}, False),
    ],
)
def test_a_page_is_waited_for_if_somebody_of_no_lower_priority_will_compute_it(change, expected):
    shares, prompt = PromptShares(BLOCK, 0.1), tokens_of(1, 10 * BLOCK)
    sequence, other = sequence_of(prompt), sequence_of(prompt[: 5 * BLOCK])
    sequence.num_computed_tokens = sequence.num_cached_tokens = 3 * BLOCK
    other.num_computed_tokens = BLOCK
    for name, value in change.items():
        setattr(other, name, value)
    assert shares.is_computed_by([sequence, other], sequence) == expected


def test_nobody_waits_for_pages_that_it_may_not_take_over():
    shares, prompt = PromptShares(BLOCK, 0.1), tokens_of(1, 10 * BLOCK)
    other = sequence_of(prompt)
    started, limited, last = (sequence_of(prompt) for _ in range(3))
    started.num_computed_tokens = 2 * BLOCK
    limited.num_computed_tokens = limited.num_cached_tokens = limited.most_cached_tokens = BLOCK
    last.num_computed_tokens = last.num_cached_tokens = 9 * BLOCK
    for sequence in (started, limited, last, sequence_of(tokens_of(2, 5 * BLOCK))):
        assert not shares.is_computed_by([other], sequence)
    assert shares.is_computed_by([other], sequence_of(prompt))
