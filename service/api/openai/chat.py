"""``POST /v1/chat/completions``: answer the turns of a chat."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Annotated, Any, Self

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, Field, model_validator
from typing_extensions import override

from service.api.body import documented_body, parsed_body
from service.api.collecting import Collected
from service.api.deps import EngineDep, MethodQueryDep, choose_method
from service.api.errors import documented_errors
from service.api.openai.answering import Answer, Shape, respond
from service.api.openai.fields import OpenAIFields
from service.api.openai.harmless import HarmlessChatFields
from service.api.openai.logprobs import ChatLogprobs, report_chat
from service.api.openai.messages import Messages, TemplateFields
from service.api.openai.submission import (
    OpenAISubmission,
    check_model,
    submit_all,
    works_of,
)
from service.engine.chat_template import ChatPrompt
from service.engine.engine import Engine
from service.engine.sequence import TokenLogprob, Update
from service.errors import BadRequestError

router = APIRouter(tags=["openai"])
_NO_LIMIT = 2**31 - 1  # but the context's


class ChatRequest(TemplateFields, OpenAIFields, HarmlessChatFields):
    """A chat to go on with."""

    messages: Messages = Field(description="The turns, oldest first.")
    max_tokens: int = Field(
        _NO_LIMIT, ge=1, le=_NO_LIMIT, description="Older name of max_completion_tokens."
    )
    max_completion_tokens: int | None = Field(
        None, ge=1, le=_NO_LIMIT, description="Most new tokens; null takes all the context holds."
    )
    logprobs: bool = Field(False, description="Whether tokens come with log-probabilities.")  # noqa: FBT003 - a default
    top_logprobs: int | None = Field(
        None, ge=0, le=20, description="Most likely tokens reported per position; needs logprobs."
    )

    @property
    @override
    def token_limit(self) -> int:
        return self.max_completion_tokens or self.max_tokens

    @property
    @override
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _check_top_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise BadRequestError("top_logprobs needs logprobs to be true.", "top_logprobs")
        return self


class AnswerMessage(BaseModel):
    """The turn of the assistant."""

    role: str
    content: str
    refusal: None = None
    tool_calls: list[dict[str, Any]] = Field(description="Always empty.")


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: str = Field(description="stop, length or abort.")
    stop_reason: str | int | None = Field(description="The stop string or token that ended it.")


class ChatResponse(Answer):
    """The answers to a chat; without ``stream``."""

    choices: list[ChatChoice]


class ChatShape(Shape):
    """A message, and one record per token for log-probabilities."""

    answer_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, body: ChatRequest, submission: OpenAISubmission) -> None:
        self._wants_logprobs = body.logprobs
        self._tokenizer = submission.engine.tokenizer

    @override
    def whole(self, index: int, collected: Collected) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": collected.text}
        message |= {"refusal": None, "tool_calls": []}
        return {"message": message, "logprobs": self._report(collected.logprobs)}

    @override
    def opening(self, index: int, first: Update) -> dict[str, Any] | None:
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    @override
    def piece(self, index: int, update: Update) -> dict[str, Any]:
        delta = {"content": update.text} if update.text else {}
        return {"delta": delta, "logprobs": self._report(list(update.logprobs))}

    def _report(self, positions: list[TokenLogprob]) -> dict[str, Any] | None:
        return report_chat(self._tokenizer, positions) if self._wants_logprobs else None


async def render(engine: Engine, fields: TemplateFields, messages: Messages) -> ChatPrompt:
    """Write a chat out as the model's template has it; off the event loop, as it may be long."""
    return await asyncio.to_thread(
        engine.tokenizer.chat_template.render,
        [message.as_turn() for message in messages],
        add_generation_prompt=fields.add_generation_prompt,
        continue_final_message=fields.continue_final_message,
        variables=fields.chat_template_kwargs,
    )


async def submitted(
    request: Request,
    engine: EngineDep,
    query: MethodQueryDep,
    body: Annotated[ChatRequest, Depends(parsed_body(ChatRequest))],
) -> AsyncIterator[tuple[ChatRequest, OpenAISubmission]]:
    """Queue the chat before the answer starts, and free its pages however the answer ends."""
    check_model(engine, body.model)
    chosen = choose_method(engine, query, body, request)
    prompt = await render(engine, body, body.messages)
    (work,) = works_of(body, chosen, "chatcmpl", [prompt.text])
    sampling = replace(work.sampling, stop=(*work.sampling.stop, *prompt.stop))
    work = replace(work, sampling=sampling, adds_special_tokens=prompt.adds_special_tokens)
    async with submit_all(request, engine, chosen, [work]) as submission:
        yield body, submission


@router.post(
    "/v1/chat/completions",
    response_model=ChatResponse,
    responses={
        200: {"content": {"text/event-stream": {}}},
        **documented_errors(400, 401, 404, 413, 429, 500, 503),
    },
    openapi_extra=documented_body(ChatRequest),
)
async def chat(
    request: Request,
    work: Annotated[tuple[ChatRequest, OpenAISubmission], Depends(submitted)],
) -> Response:
    """Answer a chat as OpenAI does; with ``stream``, send chunks as server-sent events."""
    body, submission = work
    return await respond(request, ChatShape(body, submission), body, submission)
