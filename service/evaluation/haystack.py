"""The text that prompts are cut from: a file, or what the model itself writes."""

import hashlib
import json
import lzma
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from service.engine.sequence import SamplingParams
from service.evaluation.driver import EngineDriver
from sparse_methods import get_sparse_method

_NUM_SAMPLED = 32  # texts that the model writes at once


@dataclass(frozen=True)
class Haystack:
    """Tokens of a text.

    Attributes:
        token_ids: Without special tokens.
        bytes_per_token: Mean length of a token in bytes of UTF-8; None if there is no real text.
        source: Where it came from, with a digest.
    """

    token_ids: list[int]
    bytes_per_token: float | None
    source: str

    def windows(self, opening: list[int], length: int, count: int) -> list[list[int]]:
        """``count`` windows of ``length`` + 1 tokens at even distances, each after ``opening``.

        Raises:
            ValueError: The text is too short.
        """
        num_tokens = length + 1 - len(opening)
        spare = len(self.token_ids) - num_tokens
        if spare < 0:
            raise ValueError(
                f"The text has {len(self.token_ids)} tokens; a window needs {num_tokens}."
            )
        starts = [spare * index // max(1, count - 1) for index in range(count)]
        return [[*opening, *self.token_ids[s : s + num_tokens]] for s in starts]


def read_haystack(path: Path, encode: Callable[[str], list[int]]) -> Haystack:
    """Tokenise a file: plain UTF-8, or .jsonl or .jsonl.xz whose lines have a ``text``.

    Raises:
        ValueError: The file is not what its name says.
        OSError: The file cannot be read.
    """
    digest, num_bytes = hashlib.sha256(), 0
    token_ids: list[int] = []
    try:
        for text in _texts(path):
            raw = text.encode()
            digest.update(raw)
            num_bytes += len(raw)
            token_ids += encode(text)
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, lzma.LZMAError) as error:
        raise ValueError(f"{path} cannot be read as text: {error!r}") from error
    if not token_ids:
        raise ValueError(f"{path} has no text.")
    source = f"{path.name}, sha256 {digest.hexdigest()[:12]}"
    return Haystack(token_ids, num_bytes / len(token_ids), source)


def sample_haystack(
    driver: EngineDriver, opening: list[int], num_tokens: int, seed: int
) -> Haystack:
    """Let the model write ``num_tokens`` tokens at temperature 1 under dense attention."""
    sampling = SamplingParams(
        max_tokens=-(-num_tokens // _NUM_SAMPLED), temperature=1.0, seed=seed, ignore_eos=True
    )
    dense = get_sparse_method("dense")()
    outputs = driver.generate([opening] * _NUM_SAMPLED, dense, [sampling] * _NUM_SAMPLED)
    token_ids = [token for output in outputs for token in output.token_ids]
    digest = hashlib.sha256(json.dumps(token_ids).encode()).hexdigest()[:12]
    return Haystack(token_ids, None, f"written by the model itself, sha256 {digest}")


def _texts(path: Path) -> Iterator[str]:
    if path.name.endswith((".jsonl", ".jsonl.xz")):
        reader = lzma.open if path.suffix == ".xz" else open
        with reader(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)["text"]
    else:
        yield path.read_text(encoding="utf-8")
