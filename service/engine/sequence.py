"""One generation inside the engine, and the values that cross its border."""

import logging
import math
import sys
import time
from dataclasses import dataclass, field
from enum import StrEnum

import torch

from service.engine.grammar import Grammar, Matcher
from service.engine.prefix import PrefixKeys
from service.errors import ServiceError
from sparse_methods.method import Fallback, SparseAttentionMethod
from sparse_methods.statistics import RequestStatistics

_log = logging.getLogger(__name__)


class FinishReason(StrEnum):
    """Why a generation ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen and when the generation ends; validated by the API.

    Attributes:
        temperature: 0 is greedy.
        top_k: 0 keeps all.
        logprobs: Number of most likely tokens reported per position; None reports nothing.
        prompt_logprobs: The same of the prompt.
        seed: None draws one.
        logit_bias: Pairs of token id and what is added to its logit.
        grammar: What the text must be like; None leaves it free.
    """

    max_tokens: int = 128
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    grammar: Grammar | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probabilities at one position, before temperature and penalties.

    Attributes:
        token_id: The token that is there.
        logprob: Its natural log-probability.
        top: The most likely tokens with theirs, best first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Timing:
    """Where the time of a finished generation went, in seconds."""

    queue_s: float
    prefill_s: float
    time_to_first_token_s: float
    decode_s: float
    total_s: float


@dataclass(frozen=True)
class Finish:
    """The end of one generation.

    Attributes:
        reason: Why it ended.
        stop_reason: The stop string or stop token id that ended it; None for end of sequence.
        statistics: What its attention read.
        num_prompt_tokens: Length of the prompt.
        num_cached_tokens: Prompt tokens whose keys and values were reused.
        num_generated_tokens: Tokens generated, a stop token included.
    """

    reason: FinishReason
    stop_reason: str | int | None
    statistics: RequestStatistics
    timing: Timing
    num_prompt_tokens: int
    num_cached_tokens: int
    num_generated_tokens: int

    def fallback_from(self, method: SparseAttentionMethod) -> Fallback | None:
        """What ran instead of the method, if any, and if the method can say."""
        # The last token that was generated has not been read.
        context_len = self.num_prompt_tokens + max(0, self.num_generated_tokens - 1)
        try:
            return method.fallback(self.num_prompt_tokens, context_len)
        except Exception as error:  # noqa: BLE001 - the work is done; a sequence must be able to end
            _log.error("%r cannot say whether it fell back", method.registered_name, exc_info=error)
            return None


@dataclass(frozen=True)
class Update:
    """What one or more engine steps added to one generation.

    Attributes:
        text: New text, held back as long as it could be part of a stop string or of a character.
        token_ids: New tokens.
        finish: Set on the last update.
        error: Set instead of ``finish`` if the engine failed.
        prompt_logprobs: With the first token, if asked for: the prompt's tokens but its first.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: Finish | None = None
    error: ServiceError | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()

    @property
    def is_last(self) -> bool:
        """Whether the generation has ended."""
        return self.finish is not None or self.error is not None

    def __add__(self, later: "Update") -> "Update":
        end = self if self.is_last else later  # whatever was on its way changes nothing of an end
        return Update(
            self.text + later.text,
            self.token_ids + later.token_ids,
            self.logprobs + later.logprobs,
            end.finish,
            end.error,
            self.prompt_logprobs + later.prompt_logprobs,
        )


@dataclass(eq=False)
class Sequence:
    """A generation the engine works on.

    Attributes:
        num_computed_tokens: Leading tokens whose keys and values are in the cache, or will be when
            the steps that were launched have run.
        num_pending_tokens: Tokens behind ``output_ids`` that launched steps choose; only the device
            knows them yet.
        pages: Physical pages of the KV cache it owns, in logical order.
        slot: Row of the statistics buffer it owns while it runs; None while it waits.
        matcher: Follows it through its grammar; None if its text is free.
        prefix: Keys of its prompt's pages; None if they are neither looked for nor found by others.
        num_cached_tokens: Leading tokens of the prompt that it took over instead of computing them.
        most_cached_tokens: How many it may take over. Starting over, it takes no more than when it
            first started: rows that it computed itself must count in its statistics.
        priority: Lower values are served earlier.
        queue_deadline: Until when it must have been scheduled, by the monotonic clock.
        deadline: Until when it must have ended.
    """

    request_id: str
    prompt_ids: list[int]
    method: SparseAttentionMethod
    sampling: SamplingParams
    generator: torch.Generator
    output_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_pending_tokens: int = 0
    pages: list[int] = field(default_factory=list)
    slot: int | None = None
    matcher: Matcher | None = None
    num_preemptions: int = 0
    prefix: PrefixKeys | None = None
    num_cached_tokens: int = 0
    most_cached_tokens: int = sys.maxsize
    priority: int = 0
    queue_deadline: float = math.inf
    deadline: float = math.inf
    arrived_at: float = field(default_factory=time.monotonic)
    first_scheduled_at: float | None = None
    first_token_at: float | None = None

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.prompt_ids)

    @property
    def num_output_tokens(self) -> int:
        """Generated tokens, pending ones included."""
        return len(self.output_ids) + self.num_pending_tokens

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens."""
        return len(self.prompt_ids) + self.num_output_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens whose keys and values are still missing; 1 while decoding."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def num_own_tokens(self) -> int:
        """Tokens that it computed itself since it (last) started."""
        return self.num_computed_tokens - self.num_cached_tokens

    @property
    def awaits_last_token(self) -> bool:
        """Whether a token is pending behind which ``max_tokens`` lets no other come."""
        return self.num_pending_tokens > 0 and self.num_output_tokens >= self.sampling.max_tokens

    def token(self, position: int) -> int:
        """Token id of a position; of a pending one, the reference ``~slot`` (negative).

        It stands for the token that was last chosen in that slot, which the device looks up.
        """
        index = position - len(self.prompt_ids)
        if index < 0:
            return self.prompt_ids[position]
        if index < len(self.output_ids):
            return self.output_ids[index]
        if self.slot is None:
            raise ValueError("a token can be pending only in a slot")
        return ~self.slot

    def tokens(self, start: int, stop: int) -> list[int]:
        """Token ids of positions [start, stop), as ``token`` has them."""
        num_prompt = len(self.prompt_ids)
        head = self.prompt_ids[start:stop]
        tail = self.output_ids[max(0, start - num_prompt) : max(0, stop - num_prompt)]
        num_pending = stop - start - len(head) - len(tail)
        return head + tail + [self.token(stop - 1)] * num_pending

    def timing(self) -> Timing:
        """Durations up to now; phases that were never reached took no time."""
        now = time.monotonic()
        scheduled = self.first_scheduled_at or now
        first_token = self.first_token_at or now
        return Timing(
            queue_s=scheduled - self.arrived_at,
            prefill_s=first_token - scheduled,
            time_to_first_token_s=first_token - self.arrived_at,
            decode_s=now - first_token,
            total_s=now - self.arrived_at,
        )
