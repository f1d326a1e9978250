"""Which tiles of a step are asked what: by request while prefilling, by method while decoding."""

from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch

from service.engine.sequence import Sequence
from service.engine.transfer import to_device
from service.models.selection import DecodeGroup, PrefillGroup, ThresholdGroup
from sparse_methods.kernels.operation import Tile
from sparse_methods.method import SparseAttentionMethod
from sparse_methods.views import Phase


@dataclass(frozen=True)
class OwnedTile:
    """A query tile and the sequence it belongs to."""

    tile: Tile
    owner: Sequence

    @property
    def phase(self) -> Phase:
        """Phase of its rows."""
        return Phase.DECODE if self.tile.is_decode else Phase.PREFILL

    @property
    def length(self) -> int:
        """What thresholds and break-even go by, in tokens.

        In prefill the whole prompt's length counts, so that chunking does not change a decision.
        """
        return self.tile.kv_len if self.tile.is_decode else self.owner.num_prompt_tokens

    @property
    def is_sparse(self) -> bool:
        """Whether its method is in force, and not dense attention instead."""
        return self.length >= self.owner.method.break_even(self.phase)


def overrides(method: SparseAttentionMethod, hook: str) -> bool:
    """Whether a method has its own version of an optional hook."""
    return getattr(type(method), hook) is not getattr(SparseAttentionMethod, hook)


def group_tiles(
    tiles: Items[OwnedTile], page_table: torch.Tensor, block_size: int, device: torch.device
) -> list[PrefillGroup | DecodeGroup]:
    """Collect the tiles of methods that select or score.

    ``page_table`` is [requests, max pages] int64, on the host.
    """
    prefill: dict[int, list[int]] = {}
    decode: dict[SparseAttentionMethod, list[int]] = {}
    for index, tile in enumerate(tiles):
        method = tile.owner.method
        if tile.tile.is_decode:
            if tile.is_sparse and overrides(method, "select_decode"):
                decode.setdefault(method, []).append(index)
        elif overrides(method, "select_prefill") or overrides(method, "score_pages"):
            prefill.setdefault(tile.tile.request, []).append(index)
    groups: list[PrefillGroup | DecodeGroup] = [
        _prefill_group(tiles, members, page_table, block_size, device)
        for members in prefill.values()
    ]
    groups += [
        _decode_group([(i, tiles[i]) for i in members], page_table, device)
        for members in decode.values()
    ]
    return groups


def group_adaptive(tiles: Items[OwnedTile], device: torch.device) -> list[ThresholdGroup]:
    """Collect the tiles of methods that set their thresholds anew in every layer."""
    members: dict[tuple[SparseAttentionMethod, Phase], list[int]] = {}
    for index, tile in enumerate(tiles):
        method = tile.owner.method
        if tile.is_sparse and method.adapts_thresholds(tile.phase):
            members.setdefault((method, tile.phase), []).append(index)
    return [
        ThresholdGroup(
            method=method,
            phase=phase,
            tiles=to_device(indices, device),
            kv_lens=to_device([tiles[i].length for i in indices], device),
        )
        for (method, phase), indices in members.items()
    ]


def _prefill_group(
    tiles: Items[OwnedTile],
    members: list[int],
    page_table: torch.Tensor,
    block_size: int,
    device: torch.device,
) -> PrefillGroup:
    first, last = tiles[members[0]].tile, tiles[members[-1]].tile
    owner = tiles[members[0]].owner
    num_pages = -(-last.kv_len // block_size)
    return PrefillGroup(
        method=owner.method,
        tiles=slice(members[0], members[-1] + 1),
        rows=slice(first.first_row, last.first_row + last.num_rows),
        position=first.position,
        prompt_len=owner.num_prompt_tokens,
        pages=to_device(page_table[first.request, :num_pages], device),
        slot=owner.slot or 0,
    )


def _decode_group(
    members: list[tuple[int, OwnedTile]], page_table: torch.Tensor, device: torch.device
) -> DecodeGroup:
    tiles = [owned.tile for _, owned in members]
    owners = [owned.owner for _, owned in members]
    return DecodeGroup(
        method=owners[0].method,
        tiles=to_device([index for index, _ in members], device),
        rows=to_device([tile.first_row for tile in tiles], device),
        kv_lens=to_device([tile.kv_len for tile in tiles], device, torch.int32),
        prompt_lens=to_device([owner.num_prompt_tokens for owner in owners], device, torch.int32),
        pages=to_device(page_table[torch.tensor([tile.request for tile in tiles])], device),
        slots=to_device([owner.slot or 0 for owner in owners], device),
    )
