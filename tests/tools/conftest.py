"""A tiny corpus, a tiny model and its export, for the tests of the built-in model's training."""

import dataclasses
import json
import lzma
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from tools.default_model.corpus import Corpus, tokenize
from tools.default_model.export import export
from tools.default_model.model import LanguageModel
from tools.default_model.recipe import TILE, TINY, Recipe
from tools.default_model.tasks import TaskWriter

Exported = tuple[LanguageModel, Path]

TOKENIZER = Path(__file__).parents[2] / "service" / "default_model" / "tokenizer.json"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in one order: resumed runs can be compared bit by bit
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _own_signals() -> Iterator[None]:
    """A training stops on SIGTERM and SIGINT; the process that runs the tests goes on as before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(TOKENIZER))


@pytest.fixture(scope="module")
def books() -> list[str]:
    rng = np.random.default_rng(0)
    words = ["the", "garden", "quiet", "morning", "walked", "house", "letter", "answered", "upon"]
    return [" ".join(rng.choice(words, size=3000)) + "." for _ in range(2)]


@pytest.fixture(scope="module")
def books_file(books: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("books") / "books.jsonl.xz"
    with lzma.open(path, "wt") as lines:
        lines.writelines(json.dumps({"text": book}) + "\n" for book in books)
    return path


@pytest.fixture(scope="module")
def corpus(tokenizer: Tokenizer, books: list[str]) -> Corpus:
    return tokenize(tokenizer, books)


@pytest.fixture(scope="module")
def writer(tokenizer: Tokenizer) -> TaskWriter:
    return TaskWriter(tokenizer)


@pytest.fixture(scope="module")
def exported(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A random model with weights that bfloat16 holds exactly, and the folder it went to."""
    torch.manual_seed(0)
    model = LanguageModel(TINY.shape).eval()
    for weight in model.parameters():
        weight.data = (weight.data + 0.3 * torch.randn_like(weight)).bfloat16().float()
    folder = tmp_path_factory.mktemp("export")
    export(model, tokenizer, folder)
    return model, folder


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    stages = (
        dataclasses.replace(TINY.stages[0], context=64),
        dataclasses.replace(TINY.stages[1], context=4 * TILE),
    )
    return dataclasses.replace(
        TINY, stages=stages, tokens_per_step=2048, tokens_per_micro_batch=1024
    )
