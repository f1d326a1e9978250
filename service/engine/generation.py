"""One request at the engine's door: what is asked for, and the choices that come back."""

import hashlib
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch

from service.engine.loop import EngineLoop
from service.engine.outbox import Outbox
from service.engine.sequence import SamplingParams, Sequence, Update
from sparse_methods import SparseAttentionMethod


@dataclass(frozen=True)
class GenerationRequest:
    """A validated request: exactly one of ``prompt`` and ``prompt_ids`` is given."""

    request_id: str
    method: SparseAttentionMethod
    sampling: SamplingParams
    prompt: str | None = None
    prompt_ids: list[int] | None = None
    n: int = 1


class Generation:
    """The running choices of one request; leaving the context aborts what still runs.

    Attributes:
        prompt_ids: The encoded prompt.
    """

    def __init__(self, loop: EngineLoop, sequences: list[Sequence], outbox: Outbox) -> None:
        self._loop = loop
        self._sequences = sequences
        self._outbox = outbox
        self._unfinished = set(range(len(sequences)))
        self.prompt_ids = sequences[0].prompt_ids

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for index in self._unfinished:
            self._loop.abort(self._sequences[index], "client")

    async def __aiter__(self) -> AsyncIterator[tuple[int, Update]]:
        """Yield (choice index, update) until every choice has ended.

        Raises:
            ServiceError: The engine failed one of the choices.
        """
        async for index, update in self._outbox:
            if update.finish is not None or update.error is not None:
                self._unfinished.discard(index)
            if update.error is not None:
                raise update.error
            yield index, update
            if not self._unfinished:
                return


def build_sequence(
    request_id: str,
    prompt_ids: list[int],
    method: SparseAttentionMethod,
    sampling: SamplingParams,
    index: int,
) -> Sequence:
    """Make a sequence with its own random stream: choice ``index`` of a seeded request."""
    seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
    # torch's CPU generator takes 32 bits of a seed; the digest lets all bits of ours count.
    digest = hashlib.sha256(f"{seed}:{index}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
    return Sequence(request_id, prompt_ids, method, sampling, generator)
