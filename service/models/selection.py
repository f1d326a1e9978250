"""Which blocks each tile of a batch reads in one layer: every method is asked for its own tiles."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from service.models.method_fault import MethodFaultError
from sparse_methods.kernels.operation import BlockLists, LayerGeometry, QueryTiles, visible_blocks
from sparse_methods.kernels.selection import OwnedLists, merge
from sparse_methods.method import SparseAttentionMethod
from sparse_methods.views import (
    BlockSelection,
    DecodeView,
    PageSelection,
    PageSummaries,
    Phase,
    PrefillView,
    ThresholdView,
)


@dataclass(frozen=True)
class PrefillGroup:
    """The prompt tiles of one request in this step.

    Attributes:
        tiles: Their places in the batch's tiles, side by side.
        rows: Their query rows in the packed batch, side by side.
        position: Absolute position of the first row.
        prompt_len: Tokens of the whole prompt.
        pages: [M] int64, physical pages up to the last row's own.
        slot: Row of the page scores that the request owns.
    """

    method: SparseAttentionMethod
    tiles: slice
    rows: slice
    position: int
    prompt_len: int
    pages: torch.Tensor
    slot: int


@dataclass(frozen=True)
class DecodeGroup:
    """Single rows of one method.

    Attributes:
        tiles: [n] int64, their places in the batch's tiles, ascending.
        rows: [n] int64, their rows in the packed batch, ascending.
        kv_lens: [n] int32, keys visible to each row.
        prompt_lens: [n] int32, tokens of each row's prompt.
        pages: [n, M] int64, physical pages of each row's request.
        slots: [n] int64, row of the page scores that each row's request owns.
        members: [n] bool, rows that the method's answer is for; None is all of them.
    """

    method: SparseAttentionMethod
    tiles: torch.Tensor
    rows: torch.Tensor
    kv_lens: torch.Tensor
    prompt_lens: torch.Tensor
    pages: torch.Tensor
    slots: torch.Tensor
    members: torch.Tensor | None = None


@dataclass(frozen=True)
class ThresholdGroup:
    """Tiles of one method and phase whose thresholds are set anew in every layer.

    Attributes:
        tiles: [n] int64, their places in the batch's tiles.
        kv_lens: [n] int64, as ``ThresholdView`` has them.
        members: [n] bool, tiles that the method's answer is for; None is all of them.
    """

    method: SparseAttentionMethod
    phase: Phase
    tiles: torch.Tensor
    kv_lens: torch.Tensor
    members: torch.Tensor | None = None


@dataclass(frozen=True)
class Layer:
    """One attention layer as selection sees it.

    Attributes:
        keys: [P, page_size, Hkv, D] pages of its cache.
        summaries: Of the same pages.
        page_scores: [slots, Hkv, max pages] float32, what prompts left for decoding; None if
            nobody in the batch scores.
    """

    index: int
    num_layers: int
    geometry: LayerGeometry
    keys: torch.Tensor
    summaries: PageSummaries
    page_scores: torch.Tensor | None


Selection = BlockSelection | PageSelection


@dataclass(frozen=True)
class Decided:
    """What holds for every layer of a step, since methods say that they decide alike in all.

    Attributes:
        selections: Of single methods, by place of the group and number of KV heads.
        lists: Of the whole batch, where all its methods are such, by number of KV heads.
    """

    selections: dict[tuple[int, int], Selection | None] = field(default_factory=dict)
    lists: dict[int, BlockLists | None] = field(default_factory=dict)


def select(
    layer: Layer,
    query: torch.Tensor,
    groups: Sequence[PrefillGroup | DecodeGroup],
    num_tiles: int,
    decided: Decided | None = None,
) -> BlockLists | None:
    """Ask each group; tiles whose method answers None read every visible block.

    ``query`` holds the [T, Hq, D] packed rows of a batch of ``num_tiles`` tiles. ``decided`` is
    the step's, empty in its first layer; without it every method is asked in every layer.
    """
    decided = Decided() if decided is None else decided
    num_kv_heads = layer.geometry.num_kv_heads
    if num_kv_heads in decided.lists:
        return decided.lists[num_kv_heads]
    answers: list[tuple[PrefillGroup | DecodeGroup, Selection]] = []
    for place, group in enumerate(groups):
        key, known = (place, num_kv_heads), decided.selections
        selection = known[key] if key in known else _ask(layer, query, group)
        if not group.method.selects_per_layer:
            known[key] = selection
        if selection is not None:
            answers.append((group, selection))
    lists = _lists(answers, num_tiles)
    if not any(group.method.selects_per_layer for group in groups):
        decided.lists[num_kv_heads] = lists
    return lists


def _lists(
    answers: Sequence[tuple[PrefillGroup | DecodeGroup, Selection]], num_tiles: int
) -> BlockLists | None:
    if not answers:
        return None
    if len(answers) == 1 and answers[0][1].counts.shape[0] == num_tiles:
        return _only(*answers[0])
    return _merged(answers, num_tiles)


def _only(group: PrefillGroup | DecodeGroup, selection: Selection) -> BlockLists:
    """What one method decided for all tiles; whose count is -1, nobody reads the list of."""
    counts = selection.counts
    if isinstance(group, DecodeGroup) and group.members is not None:
        counts = torch.where(group.members[:, None], counts, -1)
    return BlockLists(selection.indices.contiguous(), counts.contiguous())


def _merged(
    answers: Sequence[tuple[PrefillGroup | DecodeGroup, Selection]],
    num_tiles: int,
) -> BlockLists:
    """Lists as wide as the widest, of tiles that several groups share."""
    parts = [
        OwnedLists(selection.indices, selection.counts, group.members)
        for group, selection in answers
        if isinstance(group, DecodeGroup) and group.members is not None
    ]
    if len(parts) == len(answers):  # a padded step: everybody answers for all rows
        return BlockLists(*merge(parts))
    num_kv_heads, device = answers[0][1].counts.shape[1], answers[0][1].counts.device
    capacity = max(selection.indices.shape[2] for _, selection in answers)
    indices = torch.zeros(num_tiles, num_kv_heads, capacity, dtype=torch.int32, device=device)
    counts = torch.full((num_tiles, num_kv_heads), -1, dtype=torch.int32, device=device)
    for group, selection in answers:
        listed, count, width = selection.indices, selection.counts, selection.indices.shape[2]
        places: slice | torch.Tensor = group.tiles
        if count.shape[0] == num_tiles:
            places = slice(None)  # of ascending ones: all of them, without a copy
        indices[places, :, :width] = listed
        counts[places] = count
    return BlockLists(indices, counts)


def adapt_thresholds(
    layer: Layer,
    groups: Sequence[ThresholdGroup],
    tiles: QueryTiles,
    log_thresholds: torch.Tensor,
    blocks: torch.Tensor,
) -> torch.Tensor:
    """[N] natural log of lambda of each tile in this layer.

    ``log_thresholds`` [N] is what tiles have if nobody adapts them, ``blocks`` [N, 3] what the
    layers before this one counted.
    """
    first, last = visible_blocks(tiles, layer.geometry)
    adapted = log_thresholds.clone()
    for group in groups:
        view = ThresholdView(
            phase=group.phase,
            kv_lens=group.kv_lens,
            num_blocks=(last - first + 1)[group.tiles],
            blocks=blocks[group.tiles],
            layer=layer.index,
            num_layers=layer.num_layers,
        )
        try:
            values = group.method.adapt_thresholds(view)
        except Exception as error:
            raise MethodFaultError(group.method) from error
        if values is not None and group.members is not None:
            values = torch.where(group.members, values, adapted[group.tiles])
        if values is not None:
            adapted[group.tiles] = values
    return adapted


def _ask(layer: Layer, query: torch.Tensor, group: PrefillGroup | DecodeGroup) -> Selection | None:
    """What a method decides, or who is concerned if it raises."""
    try:
        if isinstance(group, PrefillGroup):
            return _ask_prefill(layer, query, group)
        return _ask_decode(layer, query, group)
    except Exception as error:
        slot = group.slot if isinstance(group, PrefillGroup) else None
        raise MethodFaultError(group.method, slot) from error


def _ask_prefill(layer: Layer, query: torch.Tensor, group: PrefillGroup) -> BlockSelection | None:
    view = PrefillView(
        query=query[group.rows],
        keys=layer.keys,
        pages=group.pages,
        position=group.position,
        prompt_len=group.prompt_len,
        scale=layer.geometry.scale,
        block_size=layer.keys.shape[1],
        layer=layer.index,
        num_layers=layer.num_layers,
        summaries=layer.summaries if group.method.uses_summaries else None,
    )
    if layer.page_scores is not None:
        scores = group.method.score_pages(view)
        if scores is not None:
            layer.page_scores[group.slot, :, : scores.shape[1]] += scores
    if view.prompt_len < group.method.break_even(Phase.PREFILL):
        return None
    return group.method.select_prefill(view)


def _ask_decode(layer: Layer, query: torch.Tensor, group: DecodeGroup) -> PageSelection | None:
    scores = None
    if layer.page_scores is not None:
        num_pages = group.pages.shape[1]  # of a padded step, perhaps more than there are
        scores = layer.page_scores[group.slots, :, :num_pages]
        scores = functional.pad(scores, (0, num_pages - scores.shape[2]))
    return group.method.select_decode(
        DecodeView(
            query=query if len(group.rows) == len(query) else query[group.rows],
            keys=layer.keys,
            pages=group.pages,
            kv_lens=group.kv_lens,
            prompt_lens=group.prompt_lens,
            scale=layer.geometry.scale,
            layer=layer.index,
            num_layers=layer.num_layers,
            summaries=layer.summaries if group.method.uses_summaries else None,
            page_scores=scores,
        )
    )
