"""Books as one array of tokens: read once, tokenised once, kept beside the run."""

import json
import lzma
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from tools.default_model.recipe import EOS_ID

Tokens = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class Corpus:
    """Concatenated books, each closed by `<|eos|>`.

    Attributes:
        tokens: [num_tokens]; no `<|bos|>`, so that the only one a row has is its first token.
        num_bytes: of the books' UTF-8 text, for bits per byte.
    """

    tokens: Tokens
    num_bytes: int

    @property
    def bytes_per_token(self) -> float:
        """Return the mean length of a token in bytes."""
        return self.num_bytes / len(self.tokens)


def read_books(paths: Iterable[Path]) -> Iterator[str]:
    """Yield the `text` of every line of the given .jsonl.xz files."""
    for path in paths:
        with lzma.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)["text"]


def tokenize(tokenizer: Tokenizer, books: Iterable[str]) -> Corpus:
    """Tokenise books into one array."""
    parts: list[Tokens] = []
    num_bytes = 0
    unread = iter(books)
    while group := list(islice(unread, 64)):  # a group is spread over the processor's cores
        num_bytes += sum(len(book.encode()) for book in group)
        encodings = tokenizer.encode_batch(group, add_special_tokens=False)
        parts += [np.array([*encoding.ids, EOS_ID], dtype=np.uint16) for encoding in encodings]
    return Corpus(np.concatenate(parts), num_bytes)


def load_corpus(tokenizer: Tokenizer, paths: list[Path], cache: Path | None = None) -> Corpus:
    """Tokenise the books of `paths`, or read them back from `cache` (an .npz file)."""
    if cache is not None and cache.exists():
        with np.load(cache) as saved:
            return Corpus(saved["tokens"], int(saved["num_bytes"]))
    corpus = tokenize(tokenizer, read_books(paths))
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.savez(cache, tokens=corpus.tokens, num_bytes=corpus.num_bytes)
    return corpus
