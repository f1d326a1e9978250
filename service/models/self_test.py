"""Does the packed, chunked, paged path compute what the plain model computes? Asked at every load.

Discovery trusts what a model passes to its attention function; this test trusts nothing: the plain
model runs the code of transformers, with no module fused.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from service.errors import ModelNotSupportedError
from service.models.discovery import DiscoveredLayer
from service.models.hugging_face import quiet, using_attention
from service.models.loading import LoadedModel, Reference

PackedLogits = Callable[[list[list[int]]], Sequence[torch.Tensor]]

# Error that is accepted, as a share of the logits' own size (root mean square). A wrong window,
# scale or RoPE is of order 1. The low precisions leave room for a router that flips an expert.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
_LENGTHS = (13, 29, 40)
_MAX_TOKENS = 1024  # eager attention is quadratic, and this runs at every start
_SEED = 0


@dataclass(frozen=True)
class SelfTestReport:
    """A self-test that passed.

    Attributes:
        error: Largest relative error of any prompt: |packed - plain| / |plain|.
        prompt_lens: Tokens of each prompt.
    """

    error: float
    tolerance: float
    prompt_lens: tuple[int, ...]


def run_self_test(
    loaded: LoadedModel, packed_logits: PackedLogits, max_tokens: int = _MAX_TOKENS
) -> SelfTestReport:
    """Compare one mixed batch of random tokens with each prompt alone through plain eager code.

    Args:
        loaded: The model, bound to the engine that ``packed_logits`` runs.
        packed_logits: Returns [len, V] logits of each prompt, all computed in mixed steps.
        max_tokens: Longest prompt; windows and chunks longer than that are not exceeded.

    Raises:
        ModelNotSupportedError: The logits differ, or are not numbers.
    """
    plain: Iterable[torch.Tensor]
    if loaded.reference is None:
        prompts = _prompts(loaded, max_tokens)
        packed, plain = packed_logits(prompts), _all_plain_logits(loaded, prompts)
    else:  # what the first tokens of a prompt lead to does not depend on the others
        prompts = [prompt[:max_tokens] for prompt in loaded.reference.prompts]
        packed = packed_logits(prompts)
        plain = [logits[:max_tokens] for logits in loaded.reference.logits]
    errors = [
        _relative_error(rows, expected, len(prompt))
        for prompt, rows, expected in zip(prompts, packed, plain, strict=True)
    ]
    dtype = next(loaded.model.parameters()).dtype
    tolerance = TOLERANCES.get(dtype, TOLERANCES[torch.bfloat16])
    worst = max(errors)
    if worst > tolerance:
        raise ModelNotSupportedError(
            f"Self-test of {loaded.name} failed: served in a packed batch, its logits differ from"
            f" the plain model's by {worst:.2g} of their size, {tolerance:.2g} is allowed in"
            f" {dtype} (prompts of {', '.join(str(len(p)) for p in prompts)} tokens:"
            f" {', '.join(f'{error:.2g}' for error in errors)})."
        )
    return SelfTestReport(worst, tolerance, tuple(len(prompt) for prompt in prompts))


def plain_reference(loaded: LoadedModel) -> Reference:
    """What the whole model says to short prompts, before it is divided among ranks.

    It runs where the model lies, which is on the CPU if no GPU holds it: windows and chunks longer
    than the prompts are not exceeded.
    """
    prompts = _prompts(loaded, _LENGTHS[-1])
    return Reference(tuple(prompts), tuple(_all_plain_logits(loaded, prompts)))


def _all_plain_logits(loaded: LoadedModel, prompts: list[list[int]]) -> Iterator[torch.Tensor]:
    """Logits [len, V] of each prompt, one at a time, as those of a long one are large."""
    with quiet(), using_attention(loaded.model, "eager"), loaded.fusions.suspended():
        for prompt in prompts:
            yield _plain_logits(loaded.model, prompt)


def _prompts(loaded: LoadedModel, max_tokens: int) -> list[list[int]]:
    """Random tokens; the longest prompt exceeds the smallest window or chunk if it can."""
    cap = min(max_tokens, _MAX_TOKENS, loaded.max_context_tokens)
    longest = max(_LENGTHS[-1], _smallest_limit(loaded.layers) + _LENGTHS[0])
    if longest > cap:
        longest = _LENGTHS[-1]  # the window stays out of reach: no use in coming close to it
    generator = torch.Generator().manual_seed(_SEED)
    vocab_size = int(loaded.model.config.get_text_config().vocab_size)
    return [
        torch.randint(vocab_size, (min(length, cap),), generator=generator).tolist()
        for length in (*_LENGTHS[:-1], longest)
    ]


def _smallest_limit(layers: Sequence[DiscoveredLayer]) -> int:
    sizes = [size for la in layers for size in (la.geometry.window, la.geometry.chunk) if size]
    return min(sizes, default=0)


@torch.inference_mode()
def _plain_logits(model: PreTrainedModel, prompt: list[int]) -> torch.Tensor:
    device = next(model.parameters()).device
    output = model(input_ids=torch.tensor([prompt], device=device), use_cache=False)
    logits: torch.Tensor = output.logits[0]
    return logits


def _relative_error(packed: torch.Tensor, plain: torch.Tensor, num_tokens: int) -> float:
    if not bool(plain.isfinite().all()):
        raise ModelNotSupportedError(
            f"The model's own logits are not finite in {plain.dtype}; try another dtype."
        )
    if packed.shape != plain.shape or len(packed) != num_tokens:
        raise ModelNotSupportedError(
            f"Self-test: logits of shape {tuple(packed.shape)}, expected {tuple(plain.shape)}."
        )
    if not bool(packed.isfinite().all()):
        return float("inf")
    difference = packed.to(plain.device).double() - plain.double()
    return float(difference.norm() / plain.double().norm().clamp_min(1e-30))
