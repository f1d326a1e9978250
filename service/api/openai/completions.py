"""``POST /v1/completions``: complete one or several prompts."""

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, Field
from typing_extensions import override

from service.api.body import documented_body, parsed_body
from service.api.collecting import Collected
from service.api.deps import EngineDep, MethodQueryDep, choose_method
from service.api.errors import documented_errors
from service.api.openai.answering import Answer, Shape, respond
from service.api.openai.fields import OpenAIFields, in_words
from service.api.openai.harmless import Only
from service.api.openai.logprobs import CompletionLogprobs, CompletionReporter
from service.api.openai.submission import (
    OpenAISubmission,
    check_model,
    submit_all,
    works_of,
)
from service.api.schemas import TokenId
from service.engine.sequence import SamplingParams, Update

router = APIRouter(tags=["openai"])
_Tokens = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
_Text = Annotated[str, Field(min_length=1)]
_MAX_PROMPTS = 256


class CompletionRequest(OpenAIFields):
    """Prompts to complete."""

    prompt: Annotated[
        _Text
        | _Tokens
        | Annotated[list[_Text], Field(min_length=1, max_length=_MAX_PROMPTS, fail_fast=True)]
        | Annotated[list[_Tokens], Field(min_length=1, max_length=_MAX_PROMPTS, fail_fast=True)],
        in_words(
            f"a text, a list of tokens, or a list of up to {_MAX_PROMPTS} of either, none of them"
            " empty"
        ),
    ] = Field(description="Text, tokens, or a list of either; choices come in this order.")
    max_tokens: int = Field(
        16, ge=1, le=2**31 - 1, description="Most new tokens; the context may allow fewer."
    )
    echo: bool = Field(False, description="Whether the text begins with the prompt.")  # noqa: FBT003 - a default
    logprobs: int | None = Field(
        None, ge=0, le=20, description="Most likely tokens reported per position."
    )
    add_special_tokens: bool = Field(
        True,  # noqa: FBT003 - a default
        description="Whether the model's special tokens are put around a prompt of text.",
    )
    suffix: Annotated[Any, Only([""])] = None

    @property
    @override
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, text or tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        tokens = [part for part in self.prompt if isinstance(part, int)]
        return [tokens] if tokens else [p for p in self.prompt if not isinstance(p, int)]

    @override
    def sampling(self) -> SamplingParams:
        return replace(super().sampling(), prompt_logprobs=self.logprobs if self.echo else None)


class CompletionChoice(BaseModel):
    """One completion."""

    index: int = Field(description="Choice c of prompt p has index p * n + c.")
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str = Field(description="stop, length or abort.")
    stop_reason: str | int | None = Field(description="The stop string or token that ended it.")


class CompletionResponse(Answer):
    """The completions of all prompts; without ``stream``."""

    choices: list[CompletionChoice]


class CompletionShape(Shape):
    """Text, and parallel lists of log-probabilities."""

    answer_object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, body: CompletionRequest, submission: OpenAISubmission) -> None:
        self._body = body
        self._submission = submission
        self._reporters: dict[int, CompletionReporter] = {}

    @override
    def whole(self, index: int, collected: Collected) -> dict[str, Any]:
        whole = Update(
            collected.text,
            logprobs=tuple(collected.logprobs),
            prompt_logprobs=collected.prompt_logprobs,
        )
        echo, rest = self.opening(index, whole), self.piece(index, whole)
        if echo is None:
            return rest
        logprobs = None
        if self._body.logprobs is not None:
            logprobs = {
                name: echo["logprobs"][name] + part for name, part in rest["logprobs"].items()
            }
        return {"text": echo["text"] + rest["text"], "logprobs": logprobs}

    @override
    def opening(self, index: int, first: Update) -> dict[str, Any] | None:
        if not self._body.echo:
            return None
        logprobs = None
        if self._body.logprobs is not None:
            prompt_ids = self._submission.prompts[index // self._submission.num_choices]
            logprobs = self._reporter(index).report_prompt(prompt_ids, first.prompt_logprobs)
        return {"text": self._echo(index), "logprobs": logprobs}

    @override
    def piece(self, index: int, update: Update) -> dict[str, Any]:
        if self._body.logprobs is None:
            return {"text": update.text, "logprobs": None}
        return {"text": update.text, "logprobs": self._reporter(index).report(update.logprobs)}

    def _reporter(self, index: int) -> CompletionReporter:
        if index not in self._reporters:
            self._reporters[index] = CompletionReporter(self._submission.engine.tokenizer)
        return self._reporters[index]

    def _echo(self, index: int) -> str:
        number = index // self._submission.num_choices
        prompt = self._body.prompts[number]
        if isinstance(prompt, str):
            return prompt
        return self._submission.engine.tokenizer.decode(prompt)


async def submitted(
    request: Request,
    engine: EngineDep,
    query: MethodQueryDep,
    body: Annotated[CompletionRequest, Depends(parsed_body(CompletionRequest))],
) -> AsyncIterator[tuple[CompletionRequest, OpenAISubmission]]:
    """Queue the prompts before the answer starts, and free their pages however it ends."""
    check_model(engine, body.model)
    chosen = choose_method(engine, query, body, request)
    works = works_of(body, chosen, "cmpl", body.prompts)
    if not body.add_special_tokens:
        works = [replace(work, adds_special_tokens=False) for work in works]
    async with submit_all(request, engine, chosen, works) as submission:
        yield body, submission


@router.post(
    "/v1/completions",
    response_model=CompletionResponse,
    responses={
        200: {"content": {"text/event-stream": {}}},
        **documented_errors(400, 401, 404, 413, 429, 500, 503),
    },
    openapi_extra=documented_body(CompletionRequest),
)
async def complete(
    request: Request,
    work: Annotated[tuple[CompletionRequest, OpenAISubmission], Depends(submitted)],
) -> Response:
    """Complete prompts as OpenAI does; with ``stream``, send chunks as server-sent events."""
    body, submission = work
    return await respond(request, CompletionShape(body, submission), body, submission)
