"""What a finished request tells about itself: usage, sparsity and timing."""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, Field

from service.api.deps import ChosenMethod
from service.api.schemas import SparsityDetail
from service.engine.sequence import Finish
from sparse_methods import Phase
from sparse_methods.statistics import LayerStatistics, PhaseStatistics, RequestStatistics


class CachedTokens(BaseModel):
    """Prompt tokens whose keys and values were reused."""

    cached_tokens: int = Field(
        description="Of the first choice. They were not computed and count nowhere in `sparsity`."
    )


class Usage(BaseModel):
    """Tokens of a request; a prompt counts once, the choices are summed."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class TimingBlock(BaseModel):
    """Seconds spent; of several choices, the slowest."""

    queue_s: float
    prefill_s: float
    time_to_first_token_s: float
    decode_s: float
    total_s: float


class BlockCounts(BaseModel):
    """Visible (query tile, key block) pairs, per query head, summed over layers."""

    blocks_total: int
    blocks_selected: int = Field(description="Handed to the kernel.")
    blocks_skipped: int = Field(description="Dropped inside of the kernel by the threshold.")
    density: float = Field(description="(selected - skipped) / total; 1 if there were none.")
    sparsity: float = Field(description="1 - density.")


class DecodeCounts(BlockCounts):
    """Block pairs of decode steps, and the bytes of keys and values they cost."""

    kv_bytes_read: int
    kv_bytes_dense: int = Field(description="What dense attention would have read.")


class HeadSparsity(BaseModel):
    """Counts of one query head."""

    head: int
    prefill: BlockCounts
    decode: BlockCounts


class LayerSparsity(BaseModel):
    """Counts of one attention layer."""

    layer: int
    prefill: BlockCounts
    decode: DecodeCounts
    heads: list[HeadSparsity] = Field(default=[], description="With sparsity_detail 'head'.")


class Fallback(BaseModel):
    """What ran instead of the method, and why."""

    to: str
    reason: str


class SparsityBlock(BaseModel):
    """What attention left out of one request, all choices summed."""

    method: str
    version: str
    params: dict[str, Any] = Field(description="Every knob as resolved.")
    resolved_from: str = Field(description="Where the method was named: query, body or default.")
    threshold: dict[str, Any]
    fallback: Fallback | None
    prefill: BlockCounts = Field(
        description="Of the prompt's rows that this request computed; cached tokens have none."
    )
    decode: DecodeCounts
    overall: BlockCounts
    layers: list[LayerSparsity] = Field(default=[], description="With 'layer' or 'head'.")


def usage(finishes: Sequence[Finish], num_choices: int | None = None) -> Usage:
    """Count the tokens of a request from the ends of its choices.

    Args:
        finishes: Those of the first prompt first.
        num_choices: Choices of each prompt; None if there is one prompt.
    """
    firsts = finishes[:: num_choices or len(finishes)]
    prompt = sum(finish.num_prompt_tokens for finish in firsts)
    completion = sum(finish.num_generated_tokens for finish in finishes)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=CachedTokens(
            cached_tokens=sum(finish.num_cached_tokens for finish in firsts)
        ),
    )


def timing(finishes: Sequence[Finish]) -> TimingBlock:
    """The longest of each duration over the choices of a request."""
    durations = [vars(finish.timing) for finish in finishes]
    return TimingBlock(**{name: max(d[name] for d in durations) for name in durations[0]})


def sparsity(
    chosen: ChosenMethod, finishes: Sequence[Finish], detail: SparsityDetail
) -> SparsityBlock | None:
    """The ``sparsity`` block of an answer; None if the client wants none."""
    if detail == "none":
        return None
    statistics = sum((finish.statistics for finish in finishes), RequestStatistics())
    method = chosen.method
    fallbacks = [finish.fallback_from(method) for finish in finishes]
    fallback = next(filter(None, fallbacks), None)  # of the first that had one
    block = SparsityBlock(
        method=method.registered_name,
        version=method.registered_version,
        params=method.knobs.model_dump(mode="json"),
        resolved_from=chosen.resolved_from,
        threshold=method.get_threshold_info(),
        fallback=None if fallback is None else Fallback(to=fallback.to, reason=fallback.reason),
        prefill=_block_counts(statistics.phase(Phase.PREFILL)),
        decode=_decode_counts(statistics.phase(Phase.DECODE)),
        overall=_block_counts(statistics.overall),
    )
    if detail in {"layer", "head"}:
        block.layers = [_layer(layer, detail) for layer in statistics.layers]
    return block


def _layer(layer: LayerStatistics, detail: SparsityDetail) -> LayerSparsity:
    answer = LayerSparsity(
        layer=layer.layer,
        prefill=_block_counts(layer.phases[Phase.PREFILL]),
        decode=_decode_counts(layer.phases[Phase.DECODE]),
    )
    if detail == "head":
        answer.heads = [
            HeadSparsity(
                head=index,
                prefill=_block_counts(head[Phase.PREFILL]),
                decode=_block_counts(head[Phase.DECODE]),
            )
            for index, head in enumerate(layer.heads)
        ]
    return answer


def _block_counts(counts: PhaseStatistics) -> BlockCounts:
    return BlockCounts(
        blocks_total=counts.blocks_total,
        blocks_selected=counts.blocks_selected,
        blocks_skipped=counts.blocks_skipped,
        density=counts.density,
        sparsity=counts.sparsity,
    )


def _decode_counts(counts: PhaseStatistics) -> DecodeCounts:
    return DecodeCounts(
        **vars(_block_counts(counts)),
        kv_bytes_read=counts.kv_bytes_read,
        kv_bytes_dense=counts.kv_bytes_dense,
    )
