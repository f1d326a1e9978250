"""One answer in one shape, whichever route gives it, in one piece or in events."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import orjson

from benchmarks.load import RefusedError

GENERATE, COMPLETIONS, CHAT = "/generate", "/v1/completions", "/v1/chat/completions"


@dataclass(frozen=True)
class Question:
    """A request in the fields of ``/generate``, and the route that it goes to.

    Every route takes those fields; a chat is a prompt in one message.
    """

    path: str
    fields: dict[str, Any]

    def with_fields(self, **fields: object) -> "Question":
        """The same with other fields."""
        return Question(self.path, self.fields | fields)

    def body(self, *, streams: bool) -> dict[str, Any]:
        """What is posted."""
        body = {**self.fields, "stream": streams}
        if streams and self.path != GENERATE:
            body["stream_options"] = {"include_usage": True}
        if self.path == CHAT:
            body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
        return body


@dataclass
class Choice:
    """One choice, as far as it has been told."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)  # of ``/generate``, which tells them
    finish_reason: str | None = None


@dataclass
class Answer:
    """All choices of a request by their index, and what is said of them together."""

    choices: dict[int, Choice] = field(default_factory=dict)
    usage: dict[str, Any] = field(default_factory=dict)
    sparsity: dict[str, Any] = field(default_factory=dict)

    def add(self, content: dict[str, Any]) -> None:
        """Take in an event, or a whole answer: their fields have the same names."""
        for told in content.get("choices", [content]):  # an event of /generate is of one choice
            choice = self.choices.setdefault(told["index"], Choice())
            message = told.get("message") or told.get("delta")
            text = told.get("text", "") if message is None else message.get("content")
            choice.text += text or ""
            choice.token_ids += told.get("token_ids") or []
            choice.finish_reason = told.get("finish_reason") or choice.finish_reason
        self.usage = content.get("usage") or self.usage
        self.sparsity = content.get("sparsity") or self.sparsity


async def whole_answer(client: httpx.AsyncClient, question: Question) -> Answer:
    """The answer in one piece.

    Raises:
        RefusedError: It is an error.
    """
    response = await client.post(question.path, json=question.body(streams=False))
    if response.status_code != 200:
        raise RefusedError(response.status_code, response.text, response.headers)
    answer = Answer()
    answer.add(response.json())
    return answer


async def streamed_answer(client: httpx.AsyncClient, question: Question) -> Answer:
    """The same put together from the events of a stream.

    Raises:
        RefusedError: It is an error, or one came in the middle.
    """
    answer = Answer()
    async with stream(client, question) as events:
        async for event in events:
            answer.add(event)
    return answer


@asynccontextmanager
async def stream(
    client: httpx.AsyncClient, question: Question, headers: dict[str, str] | None = None
) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
    """The events of a stream; leaving closes the connection.

    Raises:
        RefusedError: The answer is an error, or one comes in the middle.
    """
    body = question.body(streams=True)
    async with client.stream("POST", question.path, json=body, headers=headers) as response:
        if response.status_code != 200:
            text = (await response.aread()).decode()
            raise RefusedError(response.status_code, text, response.headers)
        yield _events_of(response)


async def _events_of(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        if line.startswith("data: {"):
            event = orjson.loads(line[6:])
            if "error" in event:
                raise RefusedError(event["error"]["code"], str(event))
            yield event
