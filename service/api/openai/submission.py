"""The generations of one OpenAI request: one per prompt, read as one."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterable, AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace

from fastapi import Request

from service.api.deps import ChosenMethod
from service.api.openai.fields import OpenAIFields
from service.api.running import running
from service.api.schemas import SchedulingFields
from service.engine.engine import Engine
from service.engine.generation import GenerationRequest
from service.engine.sequence import Update
from service.errors import BadRequestError, NotFoundError
from service.tracing import Followed

_MAX_ECHO = 64  # characters of a client's spelling repeated in an error
_Item = tuple[int, Update] | Exception


@dataclass(frozen=True)
class OpenAISubmission:
    """A request the engine has taken in.

    Attributes:
        id: Names the request in the answer.
        created: When it was taken in, in seconds since 1970.
        prompts: The encoded prompts.
        num_choices: Choices of each prompt; choice ``c`` of prompt ``p`` has the index
            ``p * num_choices + c``.
        generations: One per prompt; what they say is read through ``updates``.
        updates: (index, update) pairs until every choice has ended.
    """

    id: str
    created: int
    engine: Engine
    chosen: ChosenMethod
    prompts: list[list[int]]
    num_choices: int
    generations: list[Followed]
    updates: AsyncIterable[tuple[int, Update]]

    async def has_begun(self) -> None:
        """See ``Generation.has_begun``."""
        for generation in self.generations:
            await generation.has_begun()


def new_id(prefix: str) -> str:
    """An id such as ``cmpl-3f...``."""
    return f"{prefix}-{secrets.token_hex(12)}"


def check_model(engine: Engine, name: str | None) -> None:
    """Refuse a request for a model that is not the one served.

    Raises:
        NotFoundError: It is another one.
    """
    if name is not None and name != engine.model_name:
        raise NotFoundError(
            f"The model {name[:_MAX_ECHO]!r} does not exist; this server has"
            f" {engine.model_name!r}.",
            "model",
        )


@asynccontextmanager
async def submit_all(
    request: Request,
    engine: Engine,
    chosen: ChosenMethod,
    works: Sequence[GenerationRequest],
) -> AsyncIterator[OpenAISubmission]:
    """Hand several prompts to the engine, all or none; leaving aborts what still runs."""
    _check_number(engine, works)
    async with AsyncExitStack() as stack:
        created = int(time.time())
        generations = [
            await stack.enter_async_context(running(request, engine, work)) for work in works
        ]
        updates = await stack.enter_async_context(_merged(generations, works[0].n))
        yield OpenAISubmission(
            id=works[0].request_id,
            created=created,
            engine=engine,
            chosen=chosen,
            prompts=[generation.prompt_ids for generation in generations],
            num_choices=works[0].n,
            generations=generations,
            updates=updates,
        )


def works_of(
    body: OpenAIFields, chosen: ChosenMethod, prefix: str, prompts: Sequence[str | list[int]]
) -> list[GenerationRequest]:
    """What the engine is asked for: the same of every prompt."""
    one = GenerationRequest(
        request_id=new_id(prefix),
        method=chosen.method,
        sampling=body.sampling(),
        n=body.n,
        **body.model_dump(include=set(SchedulingFields.model_fields)),
    )
    return [
        replace(one, prompt=prompt) if isinstance(prompt, str) else replace(one, prompt_ids=prompt)
        for prompt in prompts
    ]


def _check_number(engine: Engine, works: Sequence[GenerationRequest]) -> None:
    """Refuse for good what could not be held even by an idle server."""
    settings = engine.settings
    num_allowed = settings.max_waiting_requests + settings.max_running_requests
    num_wanted = sum(work.n for work in works)
    if num_wanted > num_allowed:
        raise BadRequestError(
            f"The request asks for {num_wanted} choices in all; this server holds {num_allowed}.",
            "prompt",
        )


@asynccontextmanager
async def _merged(
    generations: Sequence[Followed], num_choices: int
) -> AsyncIterator[AsyncIterable[tuple[int, Update]]]:
    if len(generations) == 1:
        yield generations[0]
        return
    tasks: list[asyncio.Task[None]] = []
    try:
        yield _interleaved(generations, num_choices, tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _interleaved(
    generations: Sequence[Followed], num_choices: int, tasks: list[asyncio.Task[None]]
) -> AsyncIterator[tuple[int, Update]]:
    """Read all of them at once, from now on: whether they have begun is asked before."""
    # What waits is merged where it comes from.
    queue: asyncio.Queue[_Item] = asyncio.Queue(maxsize=1)
    for number, generation in enumerate(generations):
        tasks.append(asyncio.create_task(_pump(generation, number * num_choices, queue)))
    num_unfinished = len(generations) * num_choices
    while num_unfinished:
        item = await queue.get()
        if isinstance(item, Exception):
            raise item
        num_unfinished -= item[1].finish is not None
        yield item


async def _pump(generation: Followed, first_index: int, queue: "asyncio.Queue[_Item]") -> None:
    try:
        async for index, update in generation:
            await queue.put((first_index + index, update))
    except Exception as error:  # noqa: BLE001 - raised where the updates are read
        await queue.put(error)
