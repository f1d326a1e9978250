"""What the engine remembers between two of its steps."""

from dataclasses import dataclass, field

from service.engine.prompt_logprobs import FailedReport, PromptReport
from service.engine.sampled import Sampled
from service.engine.scheduler import Chunk
from service.engine.sequence import Sequence, TokenLogprob
from service.engine.stopping import OutputBuilder


@dataclass
class Progress:
    """What only a live sequence needs: its text so far, and when its last token came."""

    text: OutputBuilder
    last_token_at: float | None = None
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)


@dataclass(frozen=True)
class Launched:
    """A step that the device may still be working on.

    Attributes:
        completed: Sequences that get a token, in the order of ``sampled``.
        num_runs: Runs begun so far, this step's own included.
    """

    chunks: list[Chunk]
    completed: list[Sequence]
    prompts: list[PromptReport | FailedReport]
    sampled: Sampled
    num_runs: int
    launched_at: float

    @property
    def is_awaited(self) -> bool:
        """Whether what may come next depends on tokens that only the device knows yet."""
        return any(sequence.matcher is not None for sequence in self.completed)

    @property
    def num_tokens(self) -> int:
        """Tokens that it computes."""
        return sum(chunk.num_tokens for chunk in self.chunks)

    @property
    def phase(self) -> str:
        """Whether it computes prompts, generated tokens, or both."""
        is_decode = [chunk.start >= chunk.sequence.num_prompt_tokens for chunk in self.chunks]
        if all(is_decode):
            return "decode"
        return "mixed" if any(is_decode) else "prefill"
