"""Prompts whose answer is known: planted facts, chains of variables, spans to copy.

The wording is what the built-in model was trained on (``tools/default_model/tasks.py``); each piece
is encoded whole, so that any tokenizer can be used.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

Ids = list[int]
Piece = tuple[float, Ids]

FACT_DIGITS, CHAIN_DIGITS, CHAIN_LINKS = 7, 5, 3
COPY = "copy"  # the task that is not judged by an exact answer
COPY_CUE_TOKENS, COPY_ANSWER_TOKENS = 24, 40
COPY_TOKENS = COPY_CUE_TOKENS + COPY_ANSWER_TOKENS
_VOCABULARY = (
    "amber falcon silver river winter garden iron bridge quiet harbour golden meadow stone tower "
    "velvet lantern broken compass hollow valley crimson feather marble fountain distant thunder "
    "gentle shepherd frozen island burning candle hidden letter ancient forest copper kettle "
    "wooden ladder purple curtain narrow street morning shadow empty castle northern village "
    "secret mirror heavy anchor bright window simple basket eastern market gray horse"
)
_WORDS = _VOCABULARY.split()


@dataclass(frozen=True)
class Task:
    """A prompt and the one continuation that counts as right."""

    prompt: Ids
    answer: Ids


@dataclass(frozen=True)
class TaskWriter:
    """Plants tasks in passages of a text.

    Attributes:
        encode: Text to tokens, without special tokens.
        haystack: [num_tokens] the text that prompts are cut from.
        opening: Tokens that every prompt begins with.
    """

    encode: Callable[[str], Ids]
    haystack: Sequence[int]
    opening: Ids

    def needle(self, rng: np.random.Generator, length: int, num_facts: int) -> Task:
        """``num_facts`` facts at random places, one of them asked; ``length`` counts the answer."""
        numbers = [_number(rng, FACT_DIGITS) for _ in range(num_facts)]
        facts = list(zip(_names(rng, num_facts), numbers, strict=True))
        pieces = [
            (rng.random(), self.encode(f"\nThe special magic number for {name} is:{number}.\n"))
            for name, number in facts
        ]
        name, number = facts[int(rng.integers(num_facts))]
        question = (
            f"\nWhat is the special magic number for {name}?"
            f" The special magic number for {name} is:"
        )
        return self._plant(rng, length, pieces, question, number)

    def chain(self, rng: np.random.Generator, length: int) -> Task:
        """Two chains of variables, the last variable of one of them asked.

        The answer follows the chain in writing, back to its value; all of it has to be right.
        """
        pieces: list[Piece] = []
        ends = []
        names = _names(rng, 2 * CHAIN_LINKS)
        for chain in (names[:CHAIN_LINKS], names[CHAIN_LINKS:]):
            value = _number(rng, CHAIN_DIGITS)
            lines = [f"\nVAR {chain[0]} ={value}.\n"]
            lines += [f"\nVAR {name} = VAR {before}.\n" for before, name in pairwise(chain)]
            places = np.sort(rng.random(CHAIN_LINKS)).tolist()
            pieces += zip(places, map(self.encode, lines), strict=True)
            followed = "".join(f" VAR {name} =" for name in reversed(chain[:-1]))
            ends.append((chain[-1], followed + value))
        name, answer = ends[int(rng.integers(2))]
        return self._plant(rng, length, pieces, f"\nFind the value of VAR {name} =", answer)

    def copy(self, rng: np.random.Generator, length: int) -> Task:
        """A span of the passage begins again at the end; it has to go on as it did before."""
        room = length - len(self.opening) - COPY_CUE_TOKENS - COPY_ANSWER_TOKENS
        passage = self._passage(rng, room)
        start = int(rng.integers(max(1, int(0.8 * room) - COPY_TOKENS)))
        stop = start + COPY_CUE_TOKENS
        prompt = [*self.opening, *passage, *passage[start:stop]]
        return Task(prompt, passage[stop : stop + COPY_ANSWER_TOKENS])

    def _passage(self, rng: np.random.Generator, num_tokens: int) -> Ids:
        spare = len(self.haystack) - num_tokens
        if num_tokens < COPY_TOKENS or spare < 0:
            raise ValueError(
                f"a passage of {num_tokens} tokens cannot be cut from {len(self.haystack)}"
            )
        start = int(rng.integers(spare + 1))
        return list(self.haystack[start : start + num_tokens])

    def _plant(
        self,
        rng: np.random.Generator,
        length: int,
        pieces: list[Piece],
        question: str,
        answer: str,
    ) -> Task:
        asked = self.encode(question)
        answer_ids = self.encode(question + answer)[len(asked) :]
        fixed = len(self.opening) + len(asked) + len(answer_ids)
        passage = self._passage(rng, length - fixed - sum(len(ids) for _, ids in pieces))
        prompt, start = list(self.opening), 0
        for place, ids in sorted(pieces, key=lambda piece: piece[0]):
            cut = int(place * len(passage))
            prompt += [*passage[start:cut], *ids]
            start = cut
        return Task([*prompt, *passage[start:], *asked], answer_ids)


def make_tasks(
    writer: TaskWriter, length: int, num_samples: int, seed: int
) -> dict[str, list[Task]]:
    """The tasks of one prompt length by name: the same ones for every method.

    ``length`` is that of prompt and answer together, in tokens.
    """
    makers: dict[str, Callable[[np.random.Generator], Task]] = {
        "needle_1_of_4": lambda rng: writer.needle(rng, length, 4),
        "needle_1_of_16": lambda rng: writer.needle(rng, length, 16),
        f"chain_of_{CHAIN_LINKS}": lambda rng: writer.chain(rng, length),
        COPY: lambda rng: writer.copy(rng, length),
    }
    tasks = {}
    for index, (name, make) in enumerate(makers.items()):
        rng = np.random.default_rng([seed, length, index])
        tasks[name] = [make(rng) for _ in range(num_samples)]
    return tasks


def _names(rng: np.random.Generator, count: int) -> list[str]:
    """Different names of two words each."""
    chosen = rng.choice(len(_WORDS) ** 2, size=count, replace=False)
    return [f"{_WORDS[i // len(_WORDS)]} {_WORDS[i % len(_WORDS)]}" for i in chosen]


def _number(rng: np.random.Generator, num_digits: int) -> str:
    """A number of so many digits, with a space before it."""
    return " " + "".join(map(str, rng.integers(10, size=num_digits)))
