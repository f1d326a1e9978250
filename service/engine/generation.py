"""One request at the engine's door: what is asked for, and the choices that come back."""

import hashlib
import math
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

import torch

from service.engine.loop import EngineLoop
from service.engine.outbox import Outbox
from service.engine.prefix import PrefixKeys
from service.engine.sequence import SamplingParams, Sequence, Update
from service.errors import BadRequestError
from service.settings import Settings
from sparse_methods import SparseAttentionMethod


@dataclass(frozen=True)
class GenerationRequest:
    """A validated request: exactly one of ``prompt`` and ``prompt_ids`` is given.

    Attributes:
        adds_special_tokens: Whether special tokens are put around ``prompt``.
        priority: Lower values are served earlier.
        cache_salt: Only requests of the same salt share computed pages of prompts.
        reuses_prefix: Whether computed pages may be taken over. Whoever wants to see something of
            every row of the prompt cannot have that.
        timeout_s: Seconds after which it ends with what there is; the server's own limits hold too.
    """

    request_id: str
    method: SparseAttentionMethod
    sampling: SamplingParams
    prompt: str | None = None
    prompt_ids: list[int] | None = None
    n: int = 1
    adds_special_tokens: bool = True
    priority: int = 0
    cache_salt: str | None = None
    reuses_prefix: bool = True
    timeout_s: float | None = None


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

    def cancel(self) -> None:
        """End the choices that still run; each gets a last update with the reason ``abort``."""
        for index in self._unfinished:
            self._loop.cancel(self._sequences[index])

    async def has_begun(self) -> None:
        """Wait for the first update, if the request may be refused for having waited too long.

        Whoever streams asks before the answer begins: afterwards there is no refusing any more.

        Raises:
            ServiceError: The request is refused, or failed before it had a token.
        """
        if all(min(s.queue_deadline, s.deadline) == math.inf for s in self._sequences):
            return
        error = await self._outbox.first_error()
        if error is not None:
            raise error

    async def __aiter__(self) -> AsyncIterator[tuple[int, Update]]:
        """Yield (choice index, update) until every choice has ended.

        Raises:
            ServiceError: The engine failed one of the choices.
        """
        while self._unfinished:
            for index, update in await self._outbox.take():
                if update.finish is not None or update.error is not None:
                    self._unfinished.discard(index)
                if update.error is not None:
                    raise update.error
                yield index, update


def check_logit_bias(sampling: SamplingParams, vocab_size: int) -> None:
    """Refuse biases of tokens that the model does not have.

    Raises:
        BadRequestError: A token id is not below ``vocab_size``.
    """
    largest = max((token_id for token_id, _ in sampling.logit_bias), default=-1)
    if largest >= vocab_size:
        raise BadRequestError(
            f"The token {largest} of logit_bias is outside of the vocabulary: ids go from 0 to"
            f" {vocab_size - 1}.",
            "logit_bias",
        )


def build_sequences(
    request: GenerationRequest, prompt_ids: list[int], room: int, settings: Settings
) -> list[Sequence]:
    """Make the sequences of a request, one per choice.

    Args:
        request: What is asked for.
        prompt_ids: Its encoded prompt, of which the choices share the keys.
        room: Tokens that the context leaves for the output.
        settings: The server's.
    """
    prefix = None
    if settings.prefix_caching:
        prefix = PrefixKeys(
            prompt_ids,
            settings.block_size,
            request.method,
            request.cache_salt,
            may_reuse=request.reuses_prefix and request.sampling.prompt_logprobs is None,
        )
    longest_s = min(request.timeout_s or math.inf, settings.max_request_s or math.inf)
    sampling = replace(request.sampling, max_tokens=min(request.sampling.max_tokens, room))
    sequences = []
    for index in range(request.n):
        request_id = f"{request.request_id}-{index}" if request.n > 1 else request.request_id
        sequence = build_sequence(request_id, prompt_ids, request.method, sampling, index)
        sequence.prefix, sequence.priority = prefix, request.priority
        sequence.queue_deadline = sequence.arrived_at + (settings.max_queue_s or math.inf)
        sequence.deadline = sequence.arrived_at + longest_s
        sequences.append(sequence)
    return sequences


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
