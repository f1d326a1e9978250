"""Log-probabilities in the two shapes of OpenAI: parallel lists, and one record per token."""

import codecs
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import BaseModel, Field

from service.engine.sequence import TokenLogprob
from service.engine.tokenizer import Tokenizer

_LEAST = -9999.0  # JSON has no -Infinity; vLLM's floor


class CompletionLogprobs(BaseModel):
    """Of a text completion: lists with one entry per token."""

    text_offset: list[int] = Field(description="Character of the text where the token begins.")
    token_logprobs: list[float | None] = Field(description="Natural logarithms.")
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None] = Field(
        description="The most likely tokens, and the one that was taken."
    )


class ChatAlternative(BaseModel):
    """A token that could have been taken."""

    token: str
    logprob: float = Field(description="Natural logarithm.")
    bytes: list[int] = Field(description="Its UTF-8 bytes; of part of a character, those.")


class ChatToken(ChatAlternative):
    """A token of the answer."""

    top_logprobs: list[ChatAlternative] = Field(description="The most likely ones there.")


class ChatLogprobs(BaseModel):
    """Of a message: one record per token."""

    content: list[ChatToken]
    refusal: None = None


class CompletionReporter:
    """Writes the log-probabilities of one choice, in as many pieces as its text comes in."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._num_characters = 0

    def report_prompt(
        self, prompt_ids: Sequence[int], positions: Sequence[TokenLogprob]
    ) -> dict[str, Any]:
        """A prompt and all its tokens but the first, of which nothing can be told."""
        offset = self._offset(prompt_ids[0])
        rest = self.report(positions)
        return {
            "text_offset": [offset, *rest["text_offset"]],
            "token_logprobs": [None, *rest["token_logprobs"]],
            "tokens": [self._tokenizer.token_text(prompt_ids[0]), *rest["tokens"]],
            "top_logprobs": [None, *rest["top_logprobs"]],
        }

    def report(self, positions: Sequence[TokenLogprob]) -> dict[str, Any]:
        """The next tokens, as ``CompletionLogprobs``."""
        return {
            "text_offset": [self._offset(position.token_id) for position in positions],
            "token_logprobs": [_finite(position.logprob) for position in positions],
            "tokens": [self._tokenizer.token_text(position.token_id) for position in positions],
            "top_logprobs": [self._most_likely(position) for position in positions],
        }

    def _most_likely(self, position: TokenLogprob) -> dict[str, float]:
        pairs = [*position.top, (position.token_id, position.logprob)]
        return {self._tokenizer.token_text(token): _finite(logprob) for token, logprob in pairs}

    def _offset(self, token_id: int) -> int:
        start = self._num_characters
        if self._tokenizer.has_text(token_id):
            self._num_characters += len(self._utf8.decode(self._tokenizer.token_bytes(token_id)))
        return start


def report_chat(tokenizer: Tokenizer, positions: Iterable[TokenLogprob]) -> dict[str, Any]:
    """The tokens of a message, as ``ChatLogprobs``."""
    content = [
        {
            **_alternative(tokenizer, position.token_id, position.logprob),
            "top_logprobs": [_alternative(tokenizer, *pair) for pair in position.top],
        }
        for position in positions
    ]
    return {"content": content, "refusal": None}


def _alternative(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    return {
        "token": tokenizer.token_text(token_id),
        "logprob": _finite(logprob),
        "bytes": list(tokenizer.token_bytes(token_id)),
    }


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)
