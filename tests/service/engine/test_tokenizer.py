import itertools
import shutil
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from service.engine.tokenizer import TextStream, Tokenizer
from service.errors import BadRequestError, ModelNotSupportedError

MODEL_DIR = Path(__file__).parents[3] / "service" / "default_model"
BOS, EOS = 0, 1


def byte_fallback_backend() -> tokenizers.Tokenizer:
    """As Llama 2 has it: Metaspace, single bytes for unknown characters, first space dropped."""
    words = ["<s>", "</s>", "<unk>", "▁", "a", "b", "é", ".", "▁a", "▁ab", "ab", "▁▁"]
    vocab = {word: i for i, word in enumerate(words)}
    vocab |= {f"<0x{byte:02X}>": len(words) + byte for byte in range(256)}
    merges = [("▁", "a"), ("▁a", "b"), ("a", "b"), ("▁", "▁")]
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True))
    backend.add_special_tokens(["<s>", "</s>", "<unk>"])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return backend


BACKENDS = {
    "byte-level": tokenizers.Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json")),
    "byte-fallback": byte_fallback_backend(),
}
TOKENIZERS = {kind: Tokenizer(backend, {EOS}) for kind, backend in BACKENDS.items()}
BYTE_LEVEL, BYTE_FALLBACK = TOKENIZERS["byte-level"], TOKENIZERS["byte-fallback"]

kinds = st.sampled_from(sorted(TOKENIZERS))
# The low ids hold the special tokens and the single bytes of both vocabularies.
token_ids = st.lists(
    st.integers(0, 270) | st.integers(0, 4200) | st.sampled_from([-1, 2**31, 2**40]), max_size=30
)
texts = st.text(st.sampled_from("ab .é▲你🚀\n") | st.characters(exclude_categories=["Cs"]))


def streamed(tokenizer: Tokenizer, prompt_ids: list[int], groups: list[list[int]]) -> str:
    stream = TextStream(tokenizer, prompt_ids)
    return "".join([*map(stream.push, groups), stream.finish()])


def singly(ids: list[int]) -> list[list[int]]:
    return [[token_id] for token_id in ids]


def byte_tokens(tokenizer: Tokenizer, data: bytes) -> list[int]:
    ids = {tokenizer.token_bytes(i): i for i in reversed(range(tokenizer.vocab_size))}
    return [ids[bytes([byte])] for byte in data]


@settings(max_examples=300)
@given(kinds, token_ids, st.lists(token_ids, max_size=8))
def test_streamed_text_is_the_whole_text_however_the_tokens_are_grouped(kind, prompt_ids, groups):
    tokenizer = TOKENIZERS[kind]
    output_ids = [token_id for group in groups for token_id in group]
    whole = tokenizer.decode_completion(prompt_ids, output_ids)
    assert streamed(tokenizer, prompt_ids, groups) == whole
    assert streamed(tokenizer, prompt_ids, singly(output_ids)) == whole


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
def test_a_prompt_may_end_in_any_bytes(kind):
    """Half of a surrogate pair is held back by the decoder, and then is two marks, not one."""
    tokenizer = TOKENIZERS[kind]
    leads = [0x41, 0x80, 0xC3, 0xE0, 0xE4, 0xED, 0xF0, 0xF4, 0xFF]
    nexts = [0x41, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xE4]
    for prompt in itertools.product(leads, nexts, [None, 0x41, 0x80, 0xBF]):
        prompt_ids = byte_tokens(tokenizer, bytes(filter(None, prompt)))
        for output in (b"", b"\x80", b"\xbfA", b"A", b"\xed\xa0", "你".encode()):
            output_ids = byte_tokens(tokenizer, output)
            whole = tokenizer.decode_completion(prompt_ids, output_ids)
            assert streamed(tokenizer, prompt_ids, singly(output_ids)) == whole, (prompt, output)


@settings(max_examples=200)
@given(token_ids)
def test_byte_level_text_is_what_hugging_face_decodes_even_where_it_is_not_utf_8(ids):
    known = [i for i in ids if 0 <= i < BYTE_LEVEL.vocab_size]
    assert BYTE_LEVEL.decode(ids) == BACKENDS["byte-level"].decode(known)


@settings(max_examples=200)
@given(kinds, texts, st.data())
def test_text_before_and_after_any_cut_joins_to_what_hugging_face_decodes(kind, text, data):
    tokenizer, backend = TOKENIZERS[kind], BACKENDS[kind]
    ids = tokenizer.encode(text)
    cut = data.draw(st.integers(0, len(ids)))
    before = tokenizer.decode(ids[:cut])
    whole = backend.decode(ids)
    if not whole.startswith(before):  # the cut went through a character
        assert before.endswith("\ufffd")
        before = before[:-1]
    assert before + streamed(tokenizer, ids[:cut], singly(ids[cut:])) == whole


@settings(max_examples=100)
@given(texts)
@example("Hello there, 🚀")
def test_byte_level_encoding_loses_nothing(text):
    assert BYTE_LEVEL.decode(BYTE_LEVEL.encode(text)) == text


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_character_is_shown_when_its_last_byte_arrives(kind):
    tokenizer = TOKENIZERS[kind]
    stream = TextStream(tokenizer, tokenizer.encode("a"))
    ids = byte_tokens(tokenizer, "🚀".encode())
    assert [stream.push([token_id]) for token_id in ids] == ["", "", "", "🚀"]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_an_output_that_ends_inside_a_character_ends_in_one_replacement_character(kind):
    tokenizer = TOKENIZERS[kind]
    stream = TextStream(tokenizer, [])
    assert stream.push(byte_tokens(tokenizer, b"a\xf0\x9f\x9a")) == "a"
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_prompt_that_ends_inside_a_character_is_not_repeated(kind):
    tokenizer = TOKENIZERS[kind]
    prompt_ids = byte_tokens(tokenizer, b"p\xf0\x9f")
    completing = byte_tokens(tokenizer, b"\x9a\x80b")
    assert streamed(tokenizer, prompt_ids, singly(completing)) == "🚀b"
    not_completing = byte_tokens(tokenizer, b"b\xff")
    assert streamed(tokenizer, prompt_ids, singly(not_completing)) == "b\ufffd"
    assert streamed(tokenizer, prompt_ids, []) == ""


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_endless_invalid_bytes_are_shown_with_at_most_three_held_back(kind):
    tokenizer = TOKENIZERS[kind]
    stream = TextStream(tokenizer, [])
    [invalid] = byte_tokens(tokenizer, b"\x80")
    assert "".join(stream.push([invalid]) for _ in range(3000)) == "\ufffd" * 3000
    emoji = byte_tokens(tokenizer, "🚀".encode())
    assert stream.push([*emoji[:3], emoji[0]]) == "\ufffd"
    assert stream.push(emoji[1:]) == "🚀"


def test_bytes_that_follow_a_shown_character_do_not_take_it_back():
    ids = byte_tokens(BYTE_FALLBACK, b"\xc3\xa9\x80b")
    assert BACKENDS["byte-fallback"].decode(ids) == "\ufffd\ufffd\ufffdb"
    assert streamed(BYTE_FALLBACK, [], singly(ids)) == "é\ufffdb"


def test_the_first_space_of_a_completion_is_kept_after_text_and_dropped_after_none():
    output_ids = BYTE_FALLBACK.encode("ab a")
    assert streamed(BYTE_FALLBACK, BYTE_FALLBACK.encode("b"), singly(output_ids)) == " ab a"
    assert streamed(BYTE_FALLBACK, [BOS], singly(output_ids)) == "ab a"
    assert streamed(BYTE_FALLBACK, [], singly(output_ids)) == "ab a"


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_special_and_unknown_tokens_have_no_text_and_do_not_cut_characters(kind):
    tokenizer = TOKENIZERS[kind]
    first, second = byte_tokens(tokenizer, b"\xc3\xa9")
    ids = [BOS, first, EOS, -1, 2**63, 10**6, second, EOS]
    assert streamed(tokenizer, [], singly(ids)) == tokenizer.decode(ids) == "é"


def test_a_token_has_bytes_for_reports_even_if_it_is_special_or_part_of_a_character():
    assert BYTE_LEVEL.token_bytes(EOS) == b"<|eos|>"
    assert BYTE_FALLBACK.token_bytes(EOS) == b"</s>"
    assert BYTE_FALLBACK.token_bytes(BYTE_FALLBACK.encode("🚀")[1]) == b"\xf0"
    bos, *ids = BYTE_LEVEL.encode("🚀 é")
    assert BYTE_LEVEL.token_bytes(bos) == b"<|bos|>"
    assert b"".join(map(BYTE_LEVEL.token_bytes, ids)) == "🚀 é".encode()
    assert BYTE_LEVEL.token_bytes(2**40) == b""


def test_an_added_token_reads_as_it_is_written():
    backend = tokenizers.Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    backend.add_tokens(["naïve", "<tool call>"])
    tokenizer = Tokenizer(backend)
    assert tokenizer.decode(tokenizer.encode("a naïve <tool call>!")) == "a naïve <tool call>!"


def test_the_built_in_tokenizer_loads_with_the_end_tokens_of_both_configurations():
    tokenizer = Tokenizer.load(MODEL_DIR, {5})
    assert tokenizer.eos_token_ids == {EOS, 5}
    assert tokenizer.vocab_size == 4096
    assert tokenizer.encode("Once upon") == BYTE_LEVEL.encode("Once upon")


def test_a_prompt_is_never_truncated_or_padded():
    backend = byte_fallback_backend()
    backend.enable_truncation(2)
    backend.enable_padding(length=64)
    assert len(Tokenizer(backend).encode("a a a a")) == 4


def test_half_a_surrogate_pair_is_the_callers_mistake():
    with pytest.raises(BadRequestError, match="at character 1") as refused:
        BYTE_LEVEL.encode("a\ud83d")
    assert refused.value.param == "prompt"


def test_a_model_without_a_tokenizer_is_refused(tmp_path):
    shutil.copy(MODEL_DIR / "config.json", tmp_path)
    with pytest.raises(ModelNotSupportedError, match="okenizer"):
        Tokenizer.load(tmp_path)


def test_a_model_with_only_a_slow_tokenizer_is_refused(monkeypatch):
    class SlowTokenizer:
        eos_token_id = 1

    monkeypatch.setattr(
        "service.engine.tokenizer.AutoTokenizer.from_pretrained",
        lambda *args, **kwargs: SlowTokenizer(),
    )
    with pytest.raises(ModelNotSupportedError, match=r"SlowTokenizer\) is not a fast one"):
        Tokenizer.load(MODEL_DIR)


def test_a_decoder_that_looks_at_neighbouring_tokens_is_refused():
    backend = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "It": 1, "s": 2}))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.CTC("<pad>")  # drops repetitions
    with pytest.raises(ModelNotSupportedError, match="cannot be streamed"):
        Tokenizer(backend)


def test_special_tokens_are_added_unless_they_are_written_out():
    text = "Hello there"
    with_special = BYTE_LEVEL.encode(text)
    assert with_special[0] == BOS
    assert BYTE_LEVEL.encode(text, adds_special_tokens=False) == with_special[1:]
    assert BYTE_LEVEL.decode_all(with_special) == "<|bos|>" + text


def test_a_token_that_is_no_text_is_spelled_in_bytes():
    rocket = BYTE_LEVEL.encode("🚀", adds_special_tokens=False)
    assert len(rocket) > 1
    spelled = [BYTE_LEVEL.token_text(token_id) for token_id in rocket]
    assert spelled[0].startswith("bytes:\\xf0")
    assert BYTE_LEVEL.token_text(BOS) == "<|bos|>"
    assert BYTE_LEVEL.token_text(10**6) == ""
