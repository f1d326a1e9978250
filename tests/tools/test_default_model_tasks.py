"""What the training rows of the built-in model promise: books, planted tasks, tokens."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tools.default_model.batches import MicroBatches
from tools.default_model.corpus import Corpus, load_corpus
from tools.default_model.export import with_bos
from tools.default_model.recipe import BOS_ID, EOS_ID, TILE, Recipe, Stage
from tools.default_model.tasks import (
    CHAIN_LINKS,
    FACT_DIGITS,
    WHOLE_CHAINS,
    TaskWriter,
    common_words,
    fitting,
)

FACT = re.compile(r"\nThe special magic number for ([a-z ]+) is: (\d{7})\.\n")
QUESTION = re.compile(
    r"\nWhat is the special magic number for ([a-z ]+)\? "
    r"The special magic number for ([a-z ]+) is: (\d{7})\.\n"
)


def test_a_corpus_closes_each_book_with_eos_and_has_no_bos(
    corpus: Corpus, books: list[str], tokenizer: Tokenizer
) -> None:
    assert (corpus.tokens == EOS_ID).sum() == len(books)
    assert BOS_ID not in corpus.tokens
    assert tokenizer.decode(corpus.tokens.tolist()) == "".join(books)
    assert corpus.num_bytes == sum(len(book.encode()) for book in books)


def test_a_corpus_is_read_back_from_its_cache_when_the_books_are_gone(
    corpus: Corpus, books_file: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    cache = tmp_path / "kept" / "books.npz"
    load_corpus(tokenizer, [books_file], cache)
    again = load_corpus(tokenizer, [tmp_path / "nowhere"], cache)
    assert np.array_equal(again.tokens, corpus.tokens)
    assert again.bytes_per_token == corpus.bytes_per_token


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
@settings(max_examples=200)
def test_the_tokenizer_gives_back_any_text(tokenizer: Tokenizer, text: str) -> None:
    text = text.replace("<|", "< |")  # the special tokens' own names are not text
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_the_exported_tokenizer_adds_bos_and_nothing_else(
    tokenizer: Tokenizer, books: list[str]
) -> None:
    changed = with_bos(tokenizer)
    for text in (*books, "", "naïve 東京 🙂\n\n 42"):
        plain = tokenizer.encode(text, add_special_tokens=False).ids
        assert changed.encode(text, add_special_tokens=False).ids == plain
        assert changed.encode(text).ids == [BOS_ID, *plain]


def test_planted_rows_begin_with_bos_and_are_one_longer_than_their_window(
    corpus: Corpus, writer: TaskWriter
) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        row = writer.planted_row(rng, corpus.tokens[:1500])
        assert len(row) == 1501
        assert row[0] == BOS_ID
        assert (row == BOS_ID).sum() == 1


def test_every_question_in_a_row_comes_after_its_fact_and_has_its_number(
    corpus: Corpus, writer: TaskWriter, tokenizer: Tokenizer
) -> None:
    rng = np.random.default_rng(1)
    num_questions = 0
    for _ in range(60):
        text = tokenizer.decode(writer.planted_row(rng, corpus.tokens[:3000]).tolist())
        facts = {match[1]: (match[2], match.start()) for match in FACT.finditer(text)}
        for asked in QUESTION.finditer(text):
            number, planted_at = facts[asked[1]]
            assert asked[2] == asked[1]
            assert asked[3] == number
            assert planted_at < asked.start()
            num_questions += 1
    assert num_questions > 60


def test_facts_lie_at_every_distance_from_their_question(
    corpus: Corpus, writer: TaskWriter, tokenizer: Tokenizer
) -> None:
    rng = np.random.default_rng(2)
    places = []
    for _ in range(100):
        text = tokenizer.decode(writer.needle(rng, corpus.tokens[:3000], 1).ids.tolist())
        places.append(text.index("\nThe special magic") / len(text))
    assert np.histogram(places, bins=5, range=(0, 1))[0].min() >= 8


def test_a_chains_question_is_answered_by_following_its_definitions(
    corpus: Corpus, writer: TaskWriter, tokenizer: Tokenizer
) -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        trial = writer.variable_chain(rng, corpus.tokens[:2000], 3)
        text = tokenizer.decode(trial.ids.tolist())
        defined = dict(re.findall(r"\nVAR ([a-z ]+?) = (VAR [a-z ]+|\d{5})\.", text))
        asked, answer = re.findall(r"\nFind the value of VAR ([a-z ]+?) = (.*)$", text)[0]
        followed = [defined[asked]]
        while followed[-1].startswith("VAR "):
            followed.append(defined[followed[-1].removeprefix("VAR ")])
        assert len(followed) == 3
        assert " = ".join(followed) == answer
        told = tokenizer.decode(trial.ids[-trial.answer_length :].tolist())
        assert told.strip() == answer


def test_a_chain_is_asked_once_so_that_no_answer_can_be_copied_from_another(
    writer: TaskWriter, tokenizer: Tokenizer
) -> None:
    rng = np.random.default_rng(4)
    for task in (task for _ in range(30) for task in writer.chain_tasks(rng)):
        text = "".join(tokenizer.decode(ids) for _, ids in sorted(task, key=lambda p: p[0]))
        assert text.count("\nFind the value") == 1


def test_an_early_question_is_of_as_long_a_chain_as_a_late_one(writer: TaskWriter) -> None:
    """Or a model learns in long rows that whoever asks early asks for a number."""
    rng = np.random.default_rng(8)
    tasks = [task for _ in range(300) for task in writer.chain_tasks(rng)]
    for task in tasks:
        *defined_at, asked_at = [place for place, _ in task]
        assert defined_at == sorted(defined_at)
        assert defined_at[-1] < asked_at
    is_early = np.array([task[-1][0] < 0.3 for task in tasks])
    is_long = np.array([len(task) == CHAIN_LINKS + 1 for task in tasks])
    assert is_early.sum() > 100
    assert is_long[is_early].mean() == pytest.approx(is_long[~is_early].mean(), abs=0.1)
    assert is_long.mean() > WHOLE_CHAINS


def test_copied_spans_are_in_the_window(corpus: Corpus, writer: TaskWriter) -> None:
    window = corpus.tokens[:2000]
    text = window.tobytes()
    tasks = writer.copy_tasks(np.random.default_rng(5), window)
    for [(_, span)] in tasks:
        assert len(span) >= 24
        assert np.array(span, dtype=np.uint16).tobytes() in text


def test_tasks_that_do_not_fit_are_left_out_whole() -> None:
    tasks = [[(0.1, [5] * 6), (0.2, [6] * 3)], [(0.3, [7] * 4)], [(0.4, [8])]]
    assert fitting(tasks, 10) == [(0.1, [5] * 6), (0.2, [6] * 3), (0.4, [8])]


def test_too_small_a_window_for_its_facts_is_an_error(corpus: Corpus, writer: TaskWriter) -> None:
    with pytest.raises(ValueError, match="do not fit into 30"):
        writer.needle(np.random.default_rng(0), corpus.tokens[:30], 4)


def test_common_words_are_lower_case_and_ordered_by_frequency() -> None:
    assert common_words("house Paris garden house of garden house ab") == ["house", "garden"]


def test_a_micro_batch_depends_on_its_number_alone(
    corpus: Corpus, writer: TaskWriter, recipe: Recipe
) -> None:
    batches = MicroBatches(corpus.tokens, writer, recipe, 1)
    assert torch.equal(batches[3], batches[3])
    assert not torch.equal(batches[3], batches[4])
    assert batches[3].shape == (2, 4 * TILE + 1)
    assert (batches[3][:, 0] == BOS_ID).all()


def test_a_needle_trial_ends_in_the_number_of_the_asked_fact(
    corpus: Corpus, writer: TaskWriter, tokenizer: Tokenizer
) -> None:
    rng = np.random.default_rng(6)
    for _ in range(20):
        trial = writer.needle(rng, corpus.tokens[:1000], 4)
        text = tokenizer.decode(trial.ids.tolist()) + ".\n"
        facts = dict(FACT.findall(text))
        [asked] = QUESTION.findall(text)
        assert facts[asked[0]] == asked[2]
        assert len(asked[2]) == trial.answer_length == FACT_DIGITS


def test_a_drill_is_mostly_chains_and_as_long_as_any_row(
    corpus: Corpus, writer: TaskWriter, tokenizer: Tokenizer
) -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        row = writer.drilled_row(rng, corpus.tokens[:1024])
        assert len(row) == 1025
        text = tokenizer.decode(row.tolist())
        assert text.count("Find the value of VAR") >= 5


def test_a_stage_without_drills_gives_the_rows_it_always_gave(
    corpus: Corpus, writer: TaskWriter
) -> None:
    plain = Recipe(stages=(Stage(256, 1.0, planted=0.5),), tokens_per_micro_batch=1024)
    drilled = replace(plain, stages=(Stage(256, 1.0, planted=0.5, drilled=1.0),))
    rows = [MicroBatches(corpus.tokens, writer, one, 0)[0] for one in (plain, drilled)]
    assert rows[0].shape == rows[1].shape
    assert not torch.equal(*rows)
    rng = np.random.default_rng([plain.seed, 0, 0])
    start = int(rng.integers(len(corpus.tokens) - 256 + 1))
    window = corpus.tokens[start : start + 256]
    is_planted = rng.random() < 0.5
    first = writer.planted_row(rng, window) if is_planted else [BOS_ID, *window.tolist()]
    assert rows[0][0].tolist() == list(first)
