"""``POST /tokenize`` and ``POST /detokenize``, as vLLM has them."""

import asyncio
from typing import Annotated, Self

from fastapi import APIRouter, Depends
from pydantic import BaseModel, ConfigDict, Field, model_validator

from service.api.body import documented_body, parsed_body
from service.api.deps import EngineDep
from service.api.errors import documented_errors
from service.api.openai.chat import render
from service.api.openai.messages import Messages, TemplateFields
from service.api.openai.submission import check_model
from service.api.schemas import TokenId
from service.errors import BadRequestError

router = APIRouter(tags=["openai"])
_STRICT = ConfigDict(strict=True, extra="forbid", hide_input_in_errors=True)


class TokenizeRequest(TemplateFields):
    """A text or a chat to be cut into tokens."""

    model_config = _STRICT

    model: str | None = Field(None, description="Name from GET /v1/models; null takes it.")
    prompt: str | None = Field(None, description="Text; exactly one of this and messages.")
    messages: Messages | None = Field(None, description="A chat, by the model's template.")
    add_special_tokens: bool | None = Field(
        None, description="Whether special tokens are put around; null does if generation would."
    )
    return_token_strs: bool = Field(False, description="Whether to spell the tokens.")  # noqa: FBT003 - a default

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise BadRequestError("Give exactly one of 'prompt' and 'messages'.", "prompt")
        return self


class TokenizeResponse(BaseModel):
    """The tokens of a text."""

    count: int
    max_model_len: int = Field(description="Tokens of prompt and answer together.")
    tokens: list[int]
    token_strs: list[str] | None = Field(description="With return_token_strs.")


class DetokenizeRequest(BaseModel):
    """Tokens to be put together."""

    model_config = _STRICT

    model: str | None = Field(None, description="Name from GET /v1/models; null takes it.")
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


class DetokenizeResponse(BaseModel):
    """The text of tokens."""

    prompt: str


@router.post(
    "/tokenize",
    responses=documented_errors(400, 401, 404, 413, 503),
    openapi_extra=documented_body(TokenizeRequest),
)
async def tokenize(
    engine: EngineDep, body: Annotated[TokenizeRequest, Depends(parsed_body(TokenizeRequest))]
) -> TokenizeResponse:
    """Cut a text or a chat into the tokens that a generation would begin with."""
    check_model(engine, body.model)
    text, adds_special_tokens = body.prompt or "", True
    if body.messages is not None:
        prompt = await render(engine, body, body.messages)
        text, adds_special_tokens = prompt.text, prompt.adds_special_tokens
    if body.add_special_tokens is not None:
        adds_special_tokens = body.add_special_tokens
    tokens = await asyncio.to_thread(
        engine.tokenizer.encode, text, adds_special_tokens=adds_special_tokens
    )
    spelled = [engine.tokenizer.token_text(t) for t in tokens] if body.return_token_strs else None
    return TokenizeResponse(
        count=len(tokens),
        max_model_len=engine.max_context_tokens,
        tokens=tokens,
        token_strs=spelled,
    )


@router.post(
    "/detokenize",
    responses=documented_errors(400, 401, 404, 413, 503),
    openapi_extra=documented_body(DetokenizeRequest),
)
async def detokenize(
    engine: EngineDep,
    body: Annotated[DetokenizeRequest, Depends(parsed_body(DetokenizeRequest))],
) -> DetokenizeResponse:
    """Put tokens together; special ones are spelled by name."""
    check_model(engine, body.model)
    vocab_size = engine.tokenizer.vocab_size
    if max(body.tokens, default=0) >= vocab_size:
        raise BadRequestError(
            f"A token is outside of the vocabulary: ids go from 0 to {vocab_size - 1}.", "tokens"
        )
    text = await asyncio.to_thread(engine.tokenizer.decode_all, body.tokens)
    return DetokenizeResponse(prompt=text)
