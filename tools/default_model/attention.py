"""Where a model's attention mass lies, and which part of the causal tiles each rule would compute.

Attention itself stays dense: what is counted is what a rule would have left out of it.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from tools.default_model.corpus import Tokens
from tools.default_model.recipe import TILE
from tools.default_model.sparsity import kept_tiles, tile_row_maxima, tiles_of_mass

THRESHOLDS = (1e-4, 1e-3, 0.005, 0.02, 0.05, 0.1, 0.3, 0.5)
MASSES = (0.8, 0.9, 0.95, 0.98, 0.99, 0.995)
OBSERVED = "observed"  # name of the attention function; a model loaded with it can be reported on
_CHUNK_TILES = 8  # of queries whose logits are held at once

Densities = dict[str, dict[str, float]]


@dataclass(frozen=True)
class AttentionReport:
    """Densities are parts of the causal tiles, means over query heads.

    Attributes:
        mass_on_position_0: mean over heads and rows past the first tile, by layer.
        density: by rule and its number, the mean of `density_by_layer`. The rules are
            `left_to_right` and `diagonal_first` by threshold, and `top_p` by the part of each query
            tile's mass that the fewest key tiles hold.
    """

    tokens: int
    mass_on_position_0: list[float]
    density: Densities
    density_by_layer: list[Densities]


@dataclass
class _Observer:
    """Stands in for a model's attention, and looks at one row of logits after another."""

    sinks: list[float] = field(default_factory=list)
    found: list[Densities] = field(default_factory=list)

    def __call__(
        self,
        _module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        _mask: None,  # there is no mask function of our name
        **options: object,
    ) -> tuple[Tensor, None]:
        """Attend densely; query [1, Hq, T, D], key and value [1, Hkv, T, D] to [1, T, Hq, D]."""
        scale = cast("float", options["scaling"])
        self._look(query[0].float() * scale, key[0].float())
        group = query.shape[1] // key.shape[1]
        keys, values = (each.repeat_interleave(group, 1) for each in (key, value))
        # with grouped heads float32 falls back to a kernel that holds the whole [Hq, T, T]
        out = nn.functional.scaled_dot_product_attention(
            query, keys, values, is_causal=True, scale=scale
        )
        return out.transpose(1, 2), None

    def _look(self, query: Tensor, key: Tensor) -> None:
        num_heads, num_rows = query.shape[:2]
        num_tiles = num_rows // TILE
        kept: dict[tuple[str, float], Tensor] = defaultdict(lambda: query.new_zeros(()))
        sink = query.new_zeros(())
        for head in range(num_heads):
            of_head = key[head * len(key) // num_heads]
            for first_tile, logits in _masked_logits(query[head], of_head):
                maxima = tile_row_maxima(logits)
                for threshold in THRESHOLDS:
                    for order in ("left_to_right", "diagonal_first"):
                        diagonal_first = order == "diagonal_first"
                        kept[order, threshold] += kept_tiles(
                            maxima, threshold, diagonal_first=diagonal_first, first_tile=first_tile
                        ).sum()
                probabilities = logits.softmax(-1)
                tiles = probabilities.unflatten(-1, (-1, TILE)).sum(-1)
                masses = tiles.unflatten(0, (-1, TILE)).mean(1)
                for mass in MASSES:
                    kept["top_p", mass] += tiles_of_mass(masses, mass).sum()
                sink += probabilities[0 if first_tile else TILE :, 0].sum()
        self.sinks.append(sink.item() / num_heads / (num_rows - TILE))
        densities: Densities = defaultdict(dict)
        for (rule, number), count in kept.items():
            causal = num_heads * num_tiles * (num_tiles + 1) / 2
            densities[rule][str(number)] = count.item() / causal
        self.found.append(dict(densities))


def _masked_logits(query: Tensor, key: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The causal logits of a head in chunks of rows: first tile and [rows, T], -inf unseen."""
    positions = torch.arange(len(key), device=key.device)
    for start in range(0, len(query), _CHUNK_TILES * TILE):
        rows = positions[start : start + _CHUNK_TILES * TILE]
        logits = query[rows] @ key.T
        yield start // TILE, logits.masked_fill_(positions > rows[:, None], -math.inf)


@torch.no_grad()
def attention_report(model: PreTrainedModel, ids: Tokens) -> AttentionReport:
    """Report on the attention of one row.

    Args:
        model: loaded with attention `OBSERVED`, in float32.
        ids: [T], a multiple of the tile, and longer than one.
    """
    observer = _Observer()
    AttentionInterface.register(OBSERVED, observer)
    model(torch.from_numpy(ids.astype(np.int64))[None].to(model.device), logits_to_keep=1)
    mean = {
        rule: {
            number: float(np.mean([layer[rule][number] for layer in observer.found]))
            for number in numbers
        }
        for rule, numbers in observer.found[0].items()
    }
    return AttentionReport(len(ids), observer.sinks, mean, observer.found)


def _unbound(*_: object, **__: object) -> tuple[Tensor, None]:
    raise RuntimeError("only attention_report runs a model that is loaded to be observed")


AttentionInterface.register(OBSERVED, _unbound)
