"""How an answer of either OpenAI route is put together, in one piece or in chunks."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

from fastapi import Request, Response
from pydantic import BaseModel, Field

from service.api.answers import SparsityBlock, Usage, sparsity, usage
from service.api.collecting import Collected, collect
from service.api.openai.fields import OpenAIFields
from service.api.openai.submission import OpenAISubmission
from service.api.streaming import EventStream, as_json, unless_client_leaves
from service.engine.sequence import Finish, Update


class Answer(BaseModel):
    """What both routes answer besides the choices."""

    id: str
    object: str
    created: int = Field(description="Seconds since 1970.")
    model: str
    usage: Usage
    sparsity: SparsityBlock | None = Field(description="What attention left out.")
    service_tier: None = None
    system_fingerprint: None = None


class Shape(ABC):
    """What the routes differ in; one object per request, since choices come in pieces.

    Attributes:
        answer_object: Value of ``object`` in an answer.
        chunk_object: The same in a chunk.
    """

    answer_object: ClassVar[str]
    chunk_object: ClassVar[str]

    @abstractmethod
    def whole(self, index: int, collected: Collected) -> dict[str, Any]:
        """What a choice holds besides its index and why it ended."""

    @abstractmethod
    def opening(self, index: int, first: Update) -> dict[str, Any] | None:
        """The same of a chunk before the first update of a choice; None if there is none."""

    @abstractmethod
    def piece(self, index: int, update: Update) -> dict[str, Any]:
        """The same of a chunk that an update makes."""


async def respond(
    request: Request, shape: Shape, body: OpenAIFields, submission: OpenAISubmission
) -> Response:
    """Answer in one piece, or with ``stream`` in chunks, as server-sent events.

    Raises:
        ClientGoneError: The client left before the answer started.
    """
    if body.stream:
        await unless_client_leaves(request.receive, submission.has_begun())
        return EventStream(submission.updates, _ChunkWriter(shape, body, submission))
    content = await unless_client_leaves(request.receive, _whole(shape, body, submission))
    return Response(as_json(content), media_type="application/json")


async def _whole(shape: Shape, body: OpenAIFields, submission: OpenAISubmission) -> dict[str, Any]:
    """Wait for all choices, and answer in one piece."""
    num_choices = len(submission.prompts) * submission.num_choices
    choices, finishes = await collect(submission.updates, num_choices)
    return {
        **_identity(submission, shape.answer_object),
        "choices": [
            {"index": index, **shape.whole(index, choice), **_ending(choice.finish)}
            for index, choice in enumerate(choices)
        ],
        **_closing(body, submission, finishes, with_usage=True),
        "service_tier": None,
        "system_fingerprint": None,
    }


class _ChunkWriter:
    """Answers in chunks: what closes the last choice has the ``sparsity`` block, too."""

    def __init__(self, shape: Shape, body: OpenAIFields, submission: OpenAISubmission) -> None:
        self._shape = shape
        self._body = body
        self._submission = submission
        self._identity = _identity(submission, shape.chunk_object)
        self._num_choices = len(submission.prompts) * submission.num_choices
        self._num_tokens: dict[int, int] = {}  # so far, of the choices that have begun
        self._finishes: dict[int, Finish] = {}

    def write(self, index: int, update: Update) -> Iterator[dict[str, Any]]:
        """The chunks that an update makes; none if all of it is held back."""
        if index not in self._num_tokens:
            self._num_tokens[index] = 0
            opening = self._shape.opening(index, update)
            if opening is not None:
                yield self._chunk(index, opening, None)
        self._num_tokens[index] += len(update.token_ids)
        if update.finish is not None:
            self._finishes[index] = update.finish
        elif not update.text and not update.logprobs:
            return
        chunk = self._chunk(index, self._shape.piece(index, update), update.finish)
        if len(self._finishes) == self._num_choices:
            chunk |= self._closing(with_usage=False)
        yield chunk

    def close(self) -> Iterator[dict[str, Any]]:
        """The chunk on usage, if there is one."""
        if self._body.includes_usage:
            yield {**self._identity, "choices": [], **self._closing(with_usage=True)}

    def _chunk(self, index: int, content: dict[str, Any], finish: Finish | None) -> dict[str, Any]:
        choice = {"index": index, **content, **_ending(finish)}
        chunk = {**self._identity, "choices": [choice]}
        if self._body.continues_usage:
            num_prompt = len(self._submission.prompts[index // self._submission.num_choices])
            chunk["usage"] = _usage_so_far(num_prompt, self._num_tokens[index])
        return chunk

    def _closing(self, *, with_usage: bool) -> dict[str, Any]:
        finishes = [self._finishes[index] for index in range(self._num_choices)]
        return _closing(self._body, self._submission, finishes, with_usage=with_usage)


def _identity(submission: OpenAISubmission, kind: str) -> dict[str, Any]:
    return {
        "id": submission.id,
        "object": kind,
        "created": submission.created,
        "model": submission.engine.model_name,
    }


def _ending(finish: Finish | None) -> dict[str, Any]:
    if finish is None:
        return {"finish_reason": None, "stop_reason": None}
    return {"finish_reason": finish.reason.value, "stop_reason": finish.stop_reason}


def _closing(
    body: OpenAIFields, submission: OpenAISubmission, finishes: list[Finish], *, with_usage: bool
) -> dict[str, Any]:
    block = sparsity(submission.chosen, finishes, body.sparsity_detail)
    closing: dict[str, Any] = {
        "sparsity": None if block is None else block.model_dump(exclude_unset=True)
    }
    if with_usage:
        closing["usage"] = usage(finishes, submission.num_choices).model_dump()
    return closing


def _usage_so_far(num_prompt: int, num_completion: int) -> dict[str, int]:
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
    }
