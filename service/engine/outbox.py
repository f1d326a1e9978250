"""Updates of one generation on their way from the engine to whoever reads them.

The engine never waits for a reader. What a slow one has not taken yet is kept as one piece per
choice, so that it costs what its own answer weighs, and no more however long it takes.
"""

import asyncio

from service.engine.sequence import Finish, TokenLogprob, Update
from service.errors import ServiceError


class _Backlog:
    """Updates of one choice, in pieces: adding them to one another would be quadratic."""

    def __init__(self, first: Update) -> None:
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._prompt_logprobs: list[TokenLogprob] = []
        self._finish: Finish | None = None
        self.error: ServiceError | None = None
        self.add(first)

    def add(self, update: Update) -> None:
        """Take a later update."""
        self._texts.append(update.text)
        self._token_ids += update.token_ids
        self._logprobs += update.logprobs
        self._prompt_logprobs += update.prompt_logprobs
        if self._finish is None and self.error is None:  # see ``Update``
            self._finish, self.error = update.finish, update.error

    def merged(self) -> Update:
        """All of them as one."""
        return Update(
            "".join(self._texts),
            tuple(self._token_ids),
            tuple(self._logprobs),
            self._finish,
            self.error,
            tuple(self._prompt_logprobs),
        )


class Outbox:
    """Updates of one generation on their way to its reader; a slow reader gets them merged."""

    def __init__(self) -> None:
        self._pending: dict[int, Update | _Backlog] = {}
        self._arrived = asyncio.Event()

    def put(self, index: int, update: Update) -> None:
        """Add an update of choice ``index``; called on the event loop."""
        before = self._pending.get(index)
        if before is None:
            self._pending[index] = update
        elif isinstance(before, _Backlog):
            before.add(update)
        else:
            backlog = self._pending[index] = _Backlog(before)
            backlog.add(update)
        self._arrived.set()

    async def first_error(self) -> ServiceError | None:
        """Wait until something has arrived; the error among it, if any. All of it stays here."""
        await self._arrived.wait()
        errors = (waiting.error for waiting in self._pending.values())
        return next((error for error in errors if error is not None), None)

    async def take(self) -> list[tuple[int, Update]]:
        """Wait until something has arrived, and take all of it: (choice index, update)."""
        await self._arrived.wait()
        self._arrived.clear()
        pending, self._pending = self._pending, {}
        return [
            (index, update.merged() if isinstance(update, _Backlog) else update)
            for index, update in pending.items()
        ]
