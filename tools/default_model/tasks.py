"""Rows with planted tasks: facts to find again, chains of variables to follow, spans to copy.

A task is a few *pieces* (token lists) and the place of each in a window of a book; a place is a
part of the window, 0 to 1, so the distance between a fact and its question takes every length.
"""

import re
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from tokenizers import Tokenizer

from tools.default_model.corpus import Tokens
from tools.default_model.recipe import BOS_ID

Ids = list[int]
Piece = tuple[float, Ids]

MAX_FACTS, MAX_QUESTIONS, MAX_CHAINS, MAX_COPIES = 16, 8, 6, 3
FACT_DIGITS, CHAIN_DIGITS = 7, 5
CHAIN_LINKS = 3
WHOLE_CHAINS = 0.8  # part of the chains that are as long as that, their last variable asked
AT_END = 1.0


@dataclass(frozen=True)
class Trial:
    """A held-out row that ends in the answer to its one question.

    Attributes:
        ids: [context] tokens.
        answer_length: how many of the last tokens are the answer.
    """

    ids: Tokens
    answer_length: int


class TaskWriter:
    """Writes planted rows in the tokens of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, words: list[str] | None = None) -> None:
        def encode(text: str) -> Ids:
            return list(tokenizer.encode(text, add_special_tokens=False).ids)

        self._encode = encode
        self.words = words or single_token_words(tokenizer)
        self._word_ids = [encode(f" {word}") for word in self.words]
        self._digits = [encode(str(digit))[0] for digit in range(10)]
        self._space = encode(" 1")[0]
        self._phrases = {
            text: encode(text)
            for text in (
                "\nThe special magic number for",
                " is:",
                ".\n",
                "\nWhat is the special magic number for",
                "? The special magic number for",
                "\nVAR",
                " =",
                " = VAR",
                " VAR",
                "\nFind the value of VAR",
            )
        }

    def name(self, rng: np.random.Generator) -> Ids:
        """Draw a name of two words."""
        first, second = rng.integers(len(self._word_ids), size=2)
        return self._word_ids[first] + self._word_ids[second]

    def number(self, rng: np.random.Generator, length: int) -> Ids:
        """Draw a number, with the space before it."""
        return [self._space, *(self._digits[digit] for digit in rng.integers(10, size=length))]

    def _write(self, *parts: str | Ids) -> Ids:
        ids: Ids = []
        for part in parts:
            ids += self._phrases[part] if isinstance(part, str) else part
        return ids

    def fact(self, name: Ids, number: Ids) -> Ids:
        """Return the sentence that plants a fact."""
        return self._write("\nThe special magic number for", name, " is:", number, ".\n")

    def question(self, name: Ids) -> Ids:
        """Return the question for a fact, up to where its number follows."""
        asked = self._write("\nWhat is the special magic number for", name)
        return asked + self._write("? The special magic number for", name, " is:")

    def chain(
        self, rng: np.random.Generator, length: int
    ) -> tuple[list[Ids], list[tuple[Ids, Ids]]]:
        """Return a chain's definitions in order, and a question and its answer for each variable.

        An answer follows the chain in writing, one variable after another back to the value: eight
        layers can look up each of them, but not all of them behind one token.
        """
        names = [self.name(rng) for _ in range(length)]
        answer = self.number(rng, CHAIN_DIGITS)
        definitions = [self._write("\nVAR", names[0], " =", answer, ".\n")]
        questions = [(self._write("\nFind the value of VAR", names[0], " ="), answer)]
        for before, name in pairwise(names):
            definitions.append(self._write("\nVAR", name, " = VAR", before, ".\n"))
            answer = self._write(" VAR", before, " =", answer)
            questions.append((self._write("\nFind the value of VAR", name, " ="), answer))
        return definitions, questions

    def fact_tasks(self, rng: np.random.Generator) -> list[list[Piece]]:
        """Draw 1 to 16 facts, 1 to 8 of them asked; half of the questions wait for the end."""
        num_facts = int(rng.integers(1, MAX_FACTS + 1))
        num_asked = int(rng.integers(1, min(MAX_QUESTIONS, num_facts) + 1))
        tasks: list[list[Piece]] = []
        for index in range(num_facts):
            name, number = self.name(rng), self.number(rng, FACT_DIGITS)
            place = rng.random()
            pieces: list[Piece] = [(place, self.fact(name, number))]
            if index < num_asked:
                asked_at = AT_END if rng.random() < 0.5 else rng.uniform(place, 1.0)
                answer = self._write(self.question(name), number, ".\n")
                pieces.append((asked_at, answer))
            tasks.append(pieces)
        return tasks

    def chain_tasks(self, rng: np.random.Generator) -> list[list[Piece]]:
        """Draw 1 to 6 chains of 1 to 3 variables; one variable of each is asked, once.

        Asked twice, the second answer could be copied from the first without following anything.
        Most are whole: with lengths and questions drawn evenly, a model learned every name that
        follows another, and never whether a name or a number follows. The question's place is
        drawn before the definitions', so that an early question is not mostly of a short chain.
        """
        tasks: list[list[Piece]] = []
        for _ in range(int(rng.integers(1, MAX_CHAINS + 1))):
            is_whole = rng.random() < WHOLE_CHAINS
            length = CHAIN_LINKS if is_whole else int(rng.integers(1, CHAIN_LINKS + 1))
            definitions, questions = self.chain(rng, length)
            asked_at = AT_END if rng.random() < 0.5 else rng.random()
            places = (asked_at * np.sort(rng.random(length))).tolist()
            pieces = list(zip(places, definitions, strict=True))
            question, answer = questions[-1 if is_whole else int(rng.integers(length))]
            pieces.append((asked_at, self._write(question, answer, ".\n")))
            tasks.append(pieces)
        return tasks

    def copy_tasks(self, rng: np.random.Generator, window: Tokens) -> list[list[Piece]]:
        """Draw 1 to 3 spans of the window that come again later in it."""
        tasks: list[list[Piece]] = []
        for _ in range(int(rng.integers(1, MAX_COPIES + 1))):
            length = int(rng.integers(24, 160))
            place = rng.uniform(0.3, 1.0)
            start = int(rng.random() * max(0.0, place * len(window) * 0.8 - length))
            tasks.append([(place, window[start : start + length].tolist())])
        return tasks

    def planted_row(self, rng: np.random.Generator, window: Tokens) -> Tokens:
        """Return `<|bos|>` and the window with tasks planted in it, as long as both together."""
        kind = rng.random()
        tasks: list[list[Piece]] = []
        if kind < 0.45 or kind >= 0.8:
            tasks += self.fact_tasks(rng)
        if kind >= 0.45 and not 0.7 <= kind < 0.8:
            tasks += self.chain_tasks(rng)
        if kind >= 0.7:
            tasks += self.copy_tasks(rng, window)
        return with_pieces(window, fitting(tasks, len(window) // 2))

    def drilled_row(self, rng: np.random.Generator, window: Tokens) -> Tokens:
        """Return `<|bos|>` and as many chains as fit into most of the window's length.

        The window's text fills what they leave, between a tenth and a half.
        """
        budget = int(len(window) * rng.uniform(0.5, 0.9))
        tasks: list[list[Piece]] = []
        num_tokens = 0
        while num_tokens < budget:
            tasks += self.chain_tasks(rng)
            num_tokens = sum(len(ids) for task in tasks for _, ids in task)
        return with_pieces(window, fitting(tasks, budget))

    def needle(self, rng: np.random.Generator, window: Tokens, num_facts: int) -> Trial:
        """Return a trial with `num_facts` facts at random places, one of them asked."""
        facts = [(self.name(rng), self.number(rng, FACT_DIGITS)) for _ in range(num_facts)]
        name, number = facts[int(rng.integers(num_facts))]
        pieces = [(rng.random(), self.fact(*fact)) for fact in facts]
        pieces.append((AT_END, self.question(name) + number))
        return Trial(with_pieces(window, pieces), FACT_DIGITS)

    def variable_chain(self, rng: np.random.Generator, window: Tokens, length: int) -> Trial:
        """Return a trial with two chains in the window and the last variable of one asked."""
        chains = [self.chain(rng, length) for _ in range(2)]
        pieces: list[Piece] = []
        for definitions, _ in chains:
            places = np.sort(rng.random(length)).tolist()
            pieces += zip(places, definitions, strict=True)
        _, questions = chains[int(rng.integers(2))]
        question, answer = questions[-1]
        pieces.append((AT_END, question + answer))
        return Trial(with_pieces(window, pieces), len(answer))


def single_token_words(tokenizer: Tokenizer) -> list[str]:
    """Return the lower-case words of four letters or more that are one token with their space."""
    tokens = (tokenizer.decode([index]) for index in range(tokenizer.get_vocab_size()))
    return [
        token[1:]
        for token in tokens
        if len(token) > 4 and token[0] == " " and token[1:].isascii() and token[1:].isalpha()
        if token.islower()
    ]


def common_words(text: str, num_words: int = 6000) -> list[str]:
    """Return the most common lower-case words of 4 to 12 letters, for names of several tokens."""
    found = Counter(re.findall(r"\b[a-z]{4,12}\b", text))
    return [word for word, _ in found.most_common(num_words)]


def fitting(tasks: list[list[Piece]], max_tokens: int) -> list[Piece]:
    """Return the pieces of the tasks, taken in order, that fit into `max_tokens` whole."""
    pieces: list[Piece] = []
    num_tokens = 0
    for task in tasks:
        length = sum(len(ids) for _, ids in task)
        if num_tokens + length <= max_tokens:
            pieces += task
            num_tokens += length
    return pieces


def with_pieces(window: Tokens, pieces: list[Piece]) -> Tokens:
    """Return `<|bos|>`, then the window cut short to make room for the pieces at their places."""
    room = len(window) - sum(len(ids) for _, ids in pieces)
    if room < 0:
        raise ValueError(f"{len(window) - room} planted tokens do not fit into {len(window)}.")
    parts: list[Tokens] = [np.array([BOS_ID], dtype=np.uint16)]
    start = 0
    for place, ids in sorted(pieces, key=lambda piece: piece[0]):
        cut = int(place * room)
        parts += [window[start:cut], np.array(ids, dtype=np.uint16)]
        start = cut
    return np.concatenate([*parts, window[start:room]])
