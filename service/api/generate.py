"""``POST /generate``: complete one prompt through the method the request names."""

from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, Field

from service.api.answers import SparsityBlock, TimingBlock, Usage, sparsity, timing, usage
from service.api.body import documented_body, parsed_body
from service.api.collecting import collect
from service.api.deps import EngineDep, MethodQueryDep, Submission, choose_method, submit
from service.api.errors import documented_errors
from service.api.schemas import GenerateRequest
from service.api.streaming import EventStream, as_json, unless_client_leaves
from service.engine.sequence import Finish, TokenLogprob, Update

router = APIRouter(tags=["generation"])


class TokenAlternative(BaseModel):
    """A token and its natural log-probability."""

    token_id: int
    logprob: float | None


class TokenDetail(TokenAlternative):
    """A generated token with the most likely ones at its position."""

    top: list[TokenAlternative]


class Choice(BaseModel):
    """One completion."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str = Field(description="stop, length or abort.")
    stop_reason: str | int | None = Field(description="The stop string or token that ended it.")
    logprobs: list[TokenDetail] | None


class GenerateResponse(BaseModel):
    """The answer to one prompt; without ``stream``."""

    id: str
    model: str
    method: str
    version: str
    choices: list[Choice]
    text: str = Field(description="Text of the first choice.")
    usage: Usage
    sparsity: SparsityBlock | None
    timing: TimingBlock


async def submitted(
    request: Request,
    engine: EngineDep,
    query: MethodQueryDep,
    body: Annotated[GenerateRequest, Depends(parsed_body(GenerateRequest))],
) -> AsyncIterator[tuple[GenerateRequest, Submission]]:
    """Queue the request before the answer starts, and free its pages however the answer ends."""
    chosen = choose_method(engine, query, body, request)
    prompt = body.prompt_token_ids if body.prompt is None else body.prompt
    async with submit(request, engine, chosen, body, prompt or "") as submission:
        yield body, submission


@router.post(
    "/generate",
    response_model=GenerateResponse,
    responses={
        200: {"content": {"text/event-stream": {}}},
        **documented_errors(400, 401, 413, 429, 500, 503),
    },
    openapi_extra=documented_body(GenerateRequest),
)
async def generate(
    request: Request,
    work: Annotated[tuple[GenerateRequest, Submission], Depends(submitted)],
) -> Response:
    """Complete one prompt; with ``stream``, send each step as a server-sent event."""
    body, submission = work
    if body.stream:
        await unless_client_leaves(request.receive, submission.generation.has_begun())
        return EventStream(submission.generation, _EventWriter(body, submission))
    answer = await unless_client_leaves(request.receive, _collect(body, submission))
    # `layers` and `heads` are there only if the client asked for them, null values always.
    content = as_json(answer.model_dump(exclude_unset=True))
    return Response(content, media_type="application/json")


async def _collect(body: GenerateRequest, submission: Submission) -> GenerateResponse:
    collected, finishes = await collect(submission.generation, body.n)
    choices = [
        Choice(
            index=index,
            text=choice.text,
            token_ids=choice.token_ids,
            finish_reason=choice.finish.reason,
            stop_reason=choice.finish.stop_reason,
            logprobs=None if body.logprobs is None else _token_details(choice.logprobs),
        )
        for index, choice in enumerate(collected)
        if choice.finish is not None
    ]
    return GenerateResponse(
        **_identity(submission),
        choices=choices,
        text=choices[0].text,
        usage=usage(finishes),
        sparsity=sparsity(submission.chosen, finishes, body.sparsity_detail),
        timing=timing(finishes),
    )


class _EventWriter:
    def __init__(self, body: GenerateRequest, submission: Submission) -> None:
        self._body = body
        self._submission = submission
        self._finishes: dict[int, Finish] = {}

    def write(self, index: int, update: Update) -> list[object]:
        event: dict[str, Any] = {"index": index, "text": update.text, "token_ids": update.token_ids}
        if self._body.logprobs is not None:
            details = _token_details(list(update.logprobs))
            event["logprobs"] = [detail.model_dump() for detail in details]
        if update.finish is not None:
            self._finishes[index] = update.finish
            event["finish_reason"] = update.finish.reason
            event["stop_reason"] = update.finish.stop_reason
            if len(self._finishes) == self._body.n:
                finishes = [self._finishes[i] for i in range(self._body.n)]
                event |= _closing(self._body, self._submission, finishes)
        return [event]

    def close(self) -> list[object]:
        return []


def _closing(
    body: GenerateRequest, submission: Submission, finishes: list[Finish]
) -> dict[str, Any]:
    block = sparsity(submission.chosen, finishes, body.sparsity_detail)
    return {
        **_identity(submission),
        "usage": usage(finishes).model_dump(),
        "sparsity": None if block is None else block.model_dump(exclude_unset=True),
        "timing": timing(finishes).model_dump(),
    }


def _identity(submission: Submission) -> dict[str, str]:
    method = submission.chosen.method
    return {
        "id": submission.id,
        "model": submission.engine.model_name,
        "method": method.registered_name,
        "version": method.registered_version,
    }


def _token_details(logprobs: list[TokenLogprob]) -> list[TokenDetail]:
    return [
        TokenDetail(
            token_id=position.token_id,
            logprob=position.logprob,
            top=[TokenAlternative(token_id=t, logprob=value) for t, value in position.top],
        )
        for position in logprobs
    ]
