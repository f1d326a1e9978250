"""What every threshold would have skipped, from one pass of dense attention.

A block's *margin* in a query tile is the largest of m - M over the tile's rows: m the row's largest
score in the block, M its largest score so far, this block included. The block is kept at a
threshold lambda if and only if its margin exceeds log(lambda), so one pass answers for all of them.

Source: Yuan et al., "BLASST", 2025, arXiv:2512.12087; trial thresholds as in NVIDIA ModelOpt,
``attention_sparsity/calibration``, commit 9e38041d3.
"""

import torch
from torch.nn import functional

from sparse_methods.kernels.operation import AttentionInputs, LayerGeometry, Tile


def diagonal_first_order(own_blocks: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """[N, M] int64 blocks in visiting order: own [N], then 0 and the rest ascending."""
    places = torch.arange(num_blocks, device=own_blocks.device)
    own = own_blocks[:, None]
    rest = torch.where(places <= own, places - 1, places)
    return torch.where(places == 0, own, rest)


def skip_margins(block_maxima: torch.Tensor) -> torch.Tensor:
    """[..., M] margins from row maxima [..., rows, M] in visiting order; -inf where none is seen.

    Rows and blocks without a visible key hold -inf.
    """
    running = block_maxima.cummax(-1).values  # inclusive: the first block visited has margin 0
    drop = block_maxima - running
    unseen = drop.isnan()  # -inf less -inf: a row before its first visible key
    return drop.masked_fill(unseen, float("-inf")).amax(-2)


def count_skipped(
    inputs: AttentionInputs, log_thresholds: torch.Tensor, *, diagonal_first: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Count what each of K thresholds would skip of every visible block of a layer.

    Lists and thresholds among ``inputs`` are not looked at.

    Returns:
        [N, K] int64 block pairs skipped, and [N] int64 visible, both summed over query heads.
    """
    tiles = inputs.tiles.tiles
    pairs = [_count_tile(inputs, tile, log_thresholds, diagonal_first) for tile in tiles]
    skipped, totals = zip(*pairs, strict=True)
    return torch.stack(skipped), torch.tensor(totals, device=inputs.query.device)


def _count_tile(
    inputs: AttentionInputs,
    tile: Tile,
    log_thresholds: torch.Tensor,
    diagonal_first: bool,  # noqa: FBT001 - private
) -> tuple[torch.Tensor, int]:
    geometry, size = inputs.geometry, inputs.tiles.block_size
    position = torch.tensor(tile.position)
    first, last = int(geometry.first_visible(position)) // size, (tile.kv_len - 1) // size
    num_blocks = last - first + 1
    order = torch.arange(num_blocks, device=inputs.query.device)
    if diagonal_first:
        order = diagonal_first_order(order[-1:], num_blocks)[0]
    pages = inputs.page_table.pages[tile.request, first : last + 1]
    skipped = torch.zeros_like(log_thresholds, dtype=torch.int64)
    for head in range(geometry.num_kv_heads):  # one at a time: scores of a long prompt are large
        keys = inputs.keys[pages, :, head].flatten(0, 1)[: tile.kv_len - first * size]
        scores = _scores(inputs, tile, head, keys, first * size)
        margins = skip_margins(scores.unflatten(-1, (-1, size)).amax(-1)[..., order])
        skipped += (margins.flatten()[:, None] <= log_thresholds).sum(0)
    return skipped, num_blocks * geometry.num_heads


def _scores(
    inputs: AttentionInputs, tile: Tile, head: int, keys: torch.Tensor, first_key: int
) -> torch.Tensor:
    """[G, rows, M * block] float32 scores of one group; -inf where no key is visible."""
    geometry: LayerGeometry = inputs.geometry
    group = geometry.group_size
    rows = inputs.query[tile.first_row : tile.first_row + tile.num_rows]
    query = rows[:, head * group : (head + 1) * group].transpose(0, 1).float()
    scores = (query * geometry.scale) @ keys.float().T
    if geometry.softcap:
        scores = geometry.softcap * torch.tanh(scores / geometry.softcap)
    positions = torch.arange(tile.position, tile.kv_len, device=keys.device)[:, None]
    places = torch.arange(first_key, tile.kv_len, device=keys.device)
    is_hidden = (places > positions) | (places < geometry.first_visible(positions))
    padding = -keys.shape[0] % inputs.tiles.block_size
    return functional.pad(
        scores.masked_fill(is_hidden, float("-inf")), (0, padding), value=float("-inf")
    )
