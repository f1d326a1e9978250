"""Prompts are as long as asked, hold their own answers, and are the training tool's wording."""

import re

import numpy as np
import pytest
import tokenizers

from sparse_methods.evaluation.tasks import COPY_CUE_TOKENS, TaskWriter, make_tasks
from tests.service.conftest import TOKENIZER_DIR
from tools.default_model import tasks as trained

BACKEND = tokenizers.Tokenizer.from_file(str(TOKENIZER_DIR / "tokenizer.json"))


def encode(text):
    return list(BACKEND.encode(text, add_special_tokens=False).ids)


@pytest.fixture
def writer():
    text = " ".join(f"the {n} ships went by" for n in range(1000))
    return TaskWriter(encode, encode(text), [0])


def test_tasks_have_the_length_and_are_the_same_for_everybody(writer):
    tasks = make_tasks(writer, 700, 3, seed=5)
    assert list(tasks) == ["needle_1_of_4", "needle_1_of_16", "chain_of_3", "copy"]
    for group in tasks.values():
        assert len(group) == 3
        assert len({tuple(task.prompt) for task in group}) == 3
        for task in group:
            assert len(task.prompt) + len(task.answer) == 700
            assert task.prompt[0] == 0
    assert make_tasks(writer, 700, 3, seed=5) == tasks
    assert make_tasks(writer, 700, 3, seed=6) != tasks


@pytest.mark.parametrize("num_facts", [4, 16])
def test_the_needle_that_is_asked_was_planted_once(writer, num_facts):
    task = writer.needle(np.random.default_rng(1), 900, num_facts)
    text, answer = BACKEND.decode(task.prompt), BACKEND.decode(task.answer)
    planted = dict(re.findall(r"\nThe special magic number for ([a-z ]+) is: (\d{7})\.\n", text))
    assert len(planted) == num_facts
    (name,) = re.findall(
        r"\nWhat is the special magic number for ([a-z ]+)\?"
        r" The special magic number for \1 is:$",
        text,
    )
    assert answer == f" {planted[name]}"


def test_the_wording_is_token_for_token_what_the_model_was_trained_on(writer):
    task = writer.needle(np.random.default_rng(2), 500, 1)
    text = BACKEND.decode(task.prompt + task.answer)
    name, number = re.findall(r"for (\w+ \w+) is: (\d{7})", text)[0]
    tool = trained.TaskWriter(BACKEND, name.split())
    name_ids, number_ids = (
        encode(f" {name}"),
        [tool._space, *map(tool._digits.__getitem__, map(int, number))],
    )
    fact, asked = tool.fact(name_ids, number_ids), tool.question(name_ids)
    assert task.answer == number_ids
    assert task.prompt[-len(asked) :] == asked
    spans = [task.prompt[i : i + len(fact)] for i in range(len(task.prompt))]
    assert fact in spans


def test_a_chain_leads_to_the_value_that_is_asked(writer):
    task = writer.chain(np.random.default_rng(3), 600)
    text, answer = BACKEND.decode(task.prompt), BACKEND.decode(task.answer)
    values = dict(re.findall(r"\nVAR (\w+ \w+) = (\d{5})\.\n", text))
    links = dict(re.findall(r"\nVAR (\w+ \w+) = VAR (\w+ \w+)\.\n", text))
    assert len(values) == 2
    assert len(links) == 4
    (last,) = re.findall(r"\nFind the value of VAR (\w+ \w+) =$", text)
    before = links[last]
    first = links[before]
    assert answer == f" VAR {before} = VAR {first} = {values[first]}"


def test_a_copied_span_is_in_the_passage_with_its_continuation(writer):
    task = writer.copy(np.random.default_rng(4), 400)
    span = task.prompt[-COPY_CUE_TOKENS:] + task.answer
    body = task.prompt[:-COPY_CUE_TOKENS]
    assert span in [body[i : i + len(span)] for i in range(len(body))]


def test_a_length_that_cannot_hold_the_task_is_refused(writer):
    with pytest.raises(ValueError, match="cannot be cut"):
        writer.needle(np.random.default_rng(0), 300, 16)
