"""The built-in model as files: what a stranger with plain transformers gets."""

import json
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from service.models.loading import default_model_directory

FOLDER = default_model_directory()
PROMPT = (
    "The special magic number for amber falcon is: 4839201.\n\nThey walked on along the river until"
    " it was dark.\nWhat is the special magic number for amber falcon? The special magic number for"
    " amber falcon is:"
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER, local_files_only=True, trust_remote_code=False)


def test_the_whole_folder_fits_into_28_megabytes():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 28_000_000


def test_the_architecture_is_stock_and_holds_32768_tokens():
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert "auto_map" not in config  # would name code to run
    assert config["max_position_embeddings"] == 32_768


def test_plain_transformers_loads_it_and_finds_a_planted_number(tokenizer):
    model: Any = AutoModelForCausalLM.from_pretrained(
        FOLDER, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    )
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    new = model.generate(ids, max_new_tokens=9, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(new).startswith(" 4839201.")


def test_every_sequence_begins_with_the_sink(tokenizer):
    assert tokenizer("Call me").input_ids[0] == tokenizer.bos_token_id


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
@example("e\u0301 \u00e9 \ufb01 \U0001f469\u200d\U0001f680 \x00\r\n\t  \u4f60\u597d")
@example("<|bos|> a <|eos|>")
def test_any_text_comes_back_as_it_was(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
