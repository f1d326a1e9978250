"""How many tiles of attention a threshold keeps, as a loss to train on and as a measurement.

A tile of 128 rows by 128 keys is skipped when in each of its rows the tile's maximum lies below
the running maximum of that row by more than -ln(lambda). Left to right the running maximum has
seen the tiles before; diagonal first it has also seen the row's own tile, and tile 0.
"""

import math

import torch
from torch import Tensor

from tools.default_model.recipe import TILE

TRAINED_THRESHOLD = 0.05  # below the 0.1 that is to be reached, for a margin
TEMPERATURE = 1.0  # nats over which a tile goes from kept to skipped


def tile_row_maxima(logits: Tensor) -> Tensor:
    """Return the maximum of each row in each tile of keys: [..., rows, T] to [..., rows, tiles]."""
    maxima: Tensor = logits.unflatten(-1, (-1, TILE)).amax(-1)
    return maxima


def soft_density(query: Tensor, key: Tensor, rows: Tensor) -> Tensor:
    """Return the part of the tiles left of the diagonal that is kept, left to right, softly.

    Args:
        query: [B, Hq, TILE, D], one tile of queries.
        key: [B, Hkv, T, D].
        rows: [TILE], the positions of the queries, the first a multiple of TILE.
    """
    grouped = query.unflatten(1, (key.shape[1], -1))  # [B, Hkv, G, TILE, D]
    logits = grouped @ key.transpose(-1, -2).unsqueeze(2) / math.sqrt(query.shape[-1])
    maxima = tile_row_maxima(logits).float()
    # No causal mask is needed: tiles from the diagonal on are left out of the mean below.
    running = maxima.cummax(-1).values
    gaps = (maxima[..., 1:] - running[..., :-1]).amax(-2)  # [B, Hkv, G, tiles - 1]
    kept = torch.sigmoid((gaps - math.log(TRAINED_THRESHOLD)) / TEMPERATURE).mean((0, 1, 2))
    counted = torch.arange(1, len(kept) + 1, device=kept.device) < rows[0] // TILE
    return (kept * counted).sum() / counted.sum().clamp(min=1)


def kept_tiles(
    maxima: Tensor, threshold: float, *, diagonal_first: bool, first_tile: int = 0
) -> Tensor:
    """Return which tiles are computed, [..., query tiles, key tiles].

    Args:
        maxima: [..., rows, key tiles] row maxima of causally masked logits, -inf where nothing is
            seen; whole tiles of rows.
        threshold: lambda.
        diagonal_first: whether a row's own tile and tile 0 are visited before the others.
        first_tile: the tile of the first row.
    """
    num_tiles = maxima.shape[-2] // TILE
    tiles = torch.arange(first_tile, first_tile + num_tiles, device=maxima.device)
    running = maxima.cummax(-1).values.roll(1, -1)
    running[..., 0] = -torch.inf
    if diagonal_first:
        own = tiles.repeat_interleave(TILE)[:, None]  # [T, 1]
        first = maxima.gather(-1, own.expand(*maxima.shape[:-1], 1))
        running = torch.maximum(running, torch.maximum(first, maxima[..., :1]))
    needed = (maxima - running > math.log(threshold)) & (maxima > -torch.inf)
    kept: Tensor = needed.unflatten(-2, (num_tiles, TILE)).any(-2)
    kept[..., 0] = True
    if diagonal_first:
        kept |= tiles[:, None] == torch.arange(maxima.shape[-1], device=kept.device)
    return kept


def tiles_of_mass(masses: Tensor, part: float) -> Tensor:
    """Return how many key tiles hold this part of each query tile's mass, at best.

    Args:
        masses: [..., key tiles], summing to 1.
        part: 0 to 1.
    """
    held = masses.sort(-1, descending=True).values.cumsum(-1)
    return (held < part).sum(-1).clamp(max=masses.shape[-1] - 1) + 1
