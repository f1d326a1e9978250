"""Putting the updates of a request's choices together, where the answer is not streamed."""

from collections.abc import AsyncIterable
from dataclasses import dataclass, field

from service.engine.sequence import Finish, TokenLogprob, Update


@dataclass
class Collected:
    """One choice, in pieces, since adding them one by one would be quadratic."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    finish: Finish | None = None

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(self.texts)

    def add(self, update: Update) -> None:
        """Take in what a step added."""
        self.texts.append(update.text)
        self.token_ids += update.token_ids
        self.logprobs += update.logprobs
        self.prompt_logprobs += update.prompt_logprobs
        self.finish = update.finish or self.finish


async def collect(
    updates: AsyncIterable[tuple[int, Update]], num_choices: int
) -> tuple[list[Collected], list[Finish]]:
    """Read (choice, update) pairs to their end; return the choices and how each has ended."""
    choices = [Collected() for _ in range(num_choices)]
    async for index, update in updates:
        choices[index].add(update)
    return choices, [choice.finish for choice in choices if choice.finish is not None]
