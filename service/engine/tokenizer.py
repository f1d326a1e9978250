"""Text to tokens and back; owns the meaning of "the text of a generation".

Every token stands for fixed bytes, and the text of a generation is those bytes read as UTF-8, with
U+FFFD for what is not UTF-8. An incremental decoder computes the same thing piece by piece: at most
three bytes are ever held back, and nothing depends on how the tokens were grouped.
"""

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Self

import tokenizers
from transformers import AutoTokenizer

from service.engine.chat_template import ChatTemplate
from service.errors import BadRequestError, ModelNotSupportedError, TokenizerError

REPLACEMENT = "\ufffd"
BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
SELF_TEST = "It's a  test, isn't it?\n\n\tNaïve façade: 12.5 % — 你好, мир! 🚀🧪 end ."
# A character has at most four bytes and a token that has text at least one; twice that to be safe.
NUM_TAIL_TOKENS = 8


def _byte_level_alphabet() -> dict[str, int]:
    """Characters by which byte-level vocabularies write the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + rank): byte for rank, byte in enumerate(others)}


BYTE_LEVEL_ALPHABET = _byte_level_alphabet()


class Tokenizer:
    """A fast tokenizer of the Hugging Face kind, reduced to what serving needs.

    Attributes:
        eos_token_ids: Tokens that end a sequence.
        vocab_size: One more than the largest token id the tokenizer knows.
        max_chars_of_token: Characters of the longest token.
        chat_template: How the turns of a chat become a prompt.
    """

    def __init__(self, backend: tokenizers.Tokenizer, eos_token_ids: Iterable[int] = ()) -> None:
        # A tokenizer.json may carry both from training; a prompt must arrive as it was sent.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        vocabulary = backend.get_vocab(with_added_tokens=True)
        ids = set(vocabulary.values())
        self.eos_token_ids = frozenset(eos_token_ids)
        self.vocab_size = 1 + max(ids, default=-1)
        # No token spells more characters than its name has: a bound on what a prompt can be.
        self.max_chars_of_token = max(map(len, vocabulary), default=1)
        self._added_ids = frozenset(added)
        self._text_ids = frozenset(ids - {i for i, token in added.items() if token.special})
        self._bytes: dict[int, bytes] = {}
        self.chat_template = ChatTemplate()
        self._check_that_tokens_stand_for_bytes()

    @classmethod
    def load(cls, model_dir: Path, eos_token_ids: Iterable[int] = ()) -> Self:
        """Load the tokenizer of a model directory, without network and without its code.

        Args:
            model_dir: Directory of the model.
            eos_token_ids: Those of the model's configurations, beside the tokenizer's own.

        Raises:
            ModelNotSupportedError: There is no fast tokenizer, or its text cannot be streamed.
        """
        try:
            loaded = AutoTokenizer.from_pretrained(
                str(model_dir), local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, ImportError, KeyError) as error:
            message = f"No tokenizer could be loaded from {model_dir}: {error}"
            raise ModelNotSupportedError(message) from error
        backend = getattr(loaded, "backend_tokenizer", None)
        if not isinstance(backend, tokenizers.Tokenizer):
            raise ModelNotSupportedError(
                f"The tokenizer in {model_dir} ({type(loaded).__name__}) is not a fast one; "
                "the model needs a tokenizer.json"
            )
        own = () if loaded.eos_token_id is None else (loaded.eos_token_id,)
        tokenizer = cls(backend, {*own, *eos_token_ids})
        if not tokenizer._text_ids:  # transformers makes one up for a model that brought none
            raise ModelNotSupportedError(
                f"There is no tokenizer in {model_dir}; the model needs a tokenizer.json"
            )
        tokenizer.chat_template = ChatTemplate(loaded)
        return tokenizer

    def encode(self, text: str, *, adds_special_tokens: bool = True) -> list[int]:
        """Tokens of a prompt.

        Args:
            text: The prompt.
            adds_special_tokens: Whether the special tokens are put around it that the model
                expects; a chat template has written them out already.

        Raises:
            BadRequestError: The text holds half of a surrogate pair.
            TokenizerError: The tokenizer failed.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            message = f"The prompt is not valid Unicode at character {error.start}"
            raise BadRequestError(message, param="prompt") from error
        with _naming_failures():
            return self._backend.encode(text, add_special_tokens=adds_special_tokens).ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the tokens; special and unknown ones have none."""
        return self.decode_completion((), token_ids)

    def decode_completion(self, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> str:
        """Text the output adds to the prompt: what ``TextStream`` yields, in one piece.

        A character begun by the prompt and completed by the output belongs to the output.
        """
        tail = self.tail_bytes(prompt_ids)
        prompt_text = (tail or b"").decode(errors="replace")
        pieces = self.text_bytes(output_ids, opens_text=tail is None)
        text = b"".join([tail or b"", *pieces]).decode(errors="replace")
        # Only the last character of the prompt, if it was a broken one, can come out differently.
        is_completed = not text.startswith(prompt_text)
        return text[len(prompt_text) - is_completed :]

    def decode_all(self, token_ids: Sequence[int]) -> str:
        """Text of the tokens with special ones by name, as the backend puts it together."""
        return self._backend.decode(list(token_ids), skip_special_tokens=False)

    def token_text(self, token_id: int) -> str:
        """What a token says, for reports on single tokens; bytes that are no text as escapes."""
        spelled = self.token_bytes(token_id)
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to running text; its name if it is special, nothing if unknown."""
        known = self._bytes.get(token_id)
        if known is None:
            with _naming_failures():
                known = self._bytes[token_id] = self._find_bytes(token_id)
        return known

    def has_text(self, token_id: int) -> bool:
        """Whether the token is known and not a special one."""
        return token_id in self._text_ids

    def text_bytes(self, token_ids: Iterable[int], *, opens_text: bool) -> Iterator[bytes]:
        """Bytes of the tokens that have text.

        Args:
            token_ids: Tokens in order; special and unknown ones are passed over.
            opens_text: Whether no text precedes, where some tokenizers drop a space.
        """
        for token_id in filter(self.has_text, token_ids):
            yield self._opening_bytes(token_id) if opens_text else self.token_bytes(token_id)
            opens_text = False

    def tail_bytes(self, prompt_ids: Sequence[int]) -> bytes | None:
        """Last bytes of a prompt, at least a character of them; None if it has no text."""
        tail = list(islice(filter(self.has_text, reversed(prompt_ids)), NUM_TAIL_TOKENS))
        return b"".join(map(self.token_bytes, reversed(tail))) if tail else None

    @cached_property
    def _decoder_kinds(self) -> frozenset[str]:
        if self._backend.decoder is None:
            return frozenset()
        decoder = json.loads(self._backend.decoder.__getstate__())
        return frozenset(part["type"] for part in decoder.get("decoders", [decoder]))

    @cached_property
    def _anchor(self) -> tuple[int, str] | None:
        """A token with plain text, so that others can be decoded as they read after it."""
        texts = (
            (token_id, self._backend.decode([token_id])) for token_id in sorted(self._text_ids)
        )
        return next(((i, text) for i, text in texts if text.isascii() and text.isalnum()), None)

    def _find_bytes(self, token_id: int) -> bytes:
        # Ids beyond 32 bits make the backend raise OverflowError; those beyond the vocabulary
        # come from models whose embedding is padded.
        token = self._backend.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
        if token is None:
            return b""
        if "ByteLevel" in self._decoder_kinds:
            spelled = [BYTE_LEVEL_ALPHABET.get(character) for character in token]
            is_plain = token_id in self._added_ids or None in spelled
            return token.encode() if is_plain else bytes(b for b in spelled if b is not None)
        if "ByteFallback" in self._decoder_kinds and (byte := BYTE_TOKEN.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        before_id, before = self._anchor or (token_id, "")
        text = self._backend.decode([before_id, token_id], skip_special_tokens=False)
        return text.removeprefix(before).encode()

    def _opening_bytes(self, token_id: int) -> bytes:
        with _naming_failures():
            text = self._backend.decode([token_id])
        # Part of a character has no text of its own, so nothing can have been dropped from it.
        return self.token_bytes(token_id) if REPLACEMENT in text else text.encode()

    def _check_that_tokens_stand_for_bytes(self) -> None:
        token_ids = self._backend.encode(SELF_TEST).ids
        whole, ours = self._backend.decode(token_ids), self.decode(token_ids)
        if whole != ours:
            raise ModelNotSupportedError(
                "The tokenizer's decoder looks at several tokens at once, so its text cannot "
                f"be streamed: it reads {whole!r} where its tokens one by one read {ours!r}"
            )


@contextmanager
def _naming_failures() -> Iterator[None]:
    """Make one error of ours out of whatever the library raises."""
    try:
        yield
    except BaseException as error:
        # A panic of the library is no Exception, so that it would end the thread.
        if isinstance(error, Exception) or type(error).__module__.startswith("pyo3"):
            raise TokenizerError("The tokenizer failed on this request.") from error
        raise


class TextStream:
    """The text of one generation while it grows.

    The texts returned, joined, are ``decode_completion`` of the prompt and all tokens pushed.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        tail = tokenizer.tail_bytes(prompt_ids)
        self._opens_text = tail is None
        self._utf8.decode(tail or b"")
        unfinished, _ = self._utf8.getstate()
        # Mostly one mark; half of a surrogate pair is held back like an unfinished character, but
        # nothing completes it, and it reads as two.
        self._prompt_marks = unfinished.decode(errors="replace")

    def push(self, token_ids: Sequence[int]) -> str:
        """Add tokens; returns the new text that no later token can change."""
        pieces = self._tokenizer.text_bytes(token_ids, opens_text=self._opens_text)
        self._opens_text = self._opens_text and not any(map(self._tokenizer.has_text, token_ids))
        return self._without_prompt(self._utf8.decode(b"".join(pieces)))

    def finish(self) -> str:
        """End the generation; returns the text still held back."""
        return self._without_prompt(self._utf8.decode(b"", final=True))

    def _without_prompt(self, text: str) -> str:
        """Drop the marks for a character the prompt began and the output did not complete."""
        if text:
            text, self._prompt_marks = text.removeprefix(self._prompt_marks), ""
        return text
