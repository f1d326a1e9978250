"""The threshold rules as a loss and as a measurement."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tools.default_model.attention import MASSES, OBSERVED, attention_report
from tools.default_model.evaluation import load_model
from tools.default_model.model import LanguageModel
from tools.default_model.recipe import TILE
from tools.default_model.sparsity import (
    kept_tiles,
    soft_density,
    tile_row_maxima,
    tiles_of_mass,
)

Exported = tuple[LanguageModel, Path]


def test_a_tile_below_the_threshold_in_every_row_is_skipped_and_one_row_keeps_it() -> None:
    logits = torch.full((3 * TILE, 3 * TILE), -5.0)
    logits[:, 0] = 0.0  # a sink
    own = torch.arange(3 * TILE)
    logits[own, own] = 3.0
    logits[2 * TILE + 7, TILE + 1] = -1.0
    masked = logits.masked_fill(torch.ones_like(logits).triu(1) > 0, -torch.inf)
    maxima = tile_row_maxima(masked)

    left_to_right = kept_tiles(maxima, 0.1, diagonal_first=False)
    assert left_to_right.tolist() == [[True, False, False], [True, True, False], [True] * 3]
    diagonal_first = kept_tiles(maxima, 0.1, diagonal_first=True)
    assert diagonal_first.tolist() == [
        [True, False, False],
        [True, True, False],
        [True, False, True],  # -1 is far below the row's own 3, seen first
    ]


@pytest.mark.parametrize("diagonal_first", [True, False])
def test_the_rows_of_some_tiles_keep_what_they_keep_among_all(*, diagonal_first: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(4 * TILE, 4 * TILE, generator=generator)
    maxima = tile_row_maxima(logits.masked_fill(torch.ones_like(logits).triu(1) > 0, -torch.inf))
    whole = kept_tiles(maxima, 0.5, diagonal_first=diagonal_first)
    some = kept_tiles(maxima[2 * TILE :], 0.5, diagonal_first=diagonal_first, first_tile=2)
    assert torch.equal(some, whole[2:])
    assert not whole.all()


def test_the_fewest_tiles_that_hold_a_part_of_the_mass() -> None:
    masses = torch.tensor([[0.1, 0.5, 0.3, 0.1], [1.0, 0.0, 0.0, 0.0], [0.25] * 4])
    assert tiles_of_mass(masses, 0.75).tolist() == [2, 1, 3]
    assert tiles_of_mass(masses, 0.95).tolist() == [4, 1, 4]


def test_soft_density_falls_when_a_sink_outshines_the_other_tiles() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 2, TILE, 8, generator=generator)
    query[..., 0] = 3.0
    key = 0.1 * torch.randn(1, 1, 4 * TILE, 8, generator=generator)
    rows = 3 * TILE + torch.arange(TILE)
    flat = soft_density(query, key, rows)
    key[:, :, 0, 0] = 9.0
    key.requires_grad_()
    sunk = soft_density(query, key, rows)
    sunk.backward()
    assert flat > 0.8
    assert sunk < 0.3
    assert key.grad is not None
    assert key.grad[0, 0, 0, 0] < 0  # a larger sink lowers it further


def test_an_attention_report_finds_a_sink_where_all_look_at_position_0(exported: Exported) -> None:
    model = load_model(exported[1], torch.device("cpu"), torch.float32, attention=OBSERVED)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_norm.weight.zero_()
    report = attention_report(model, np.full(2 * TILE, 5, dtype=np.uint16))
    # Without queries each row looks at all it sees alike: 1 / row of it at position 0.
    uniform = np.mean([1 / row for row in range(TILE + 1, 2 * TILE + 1)])
    assert report.mass_on_position_0 == pytest.approx([uniform] * 2, rel=1e-3)
    assert report.density["left_to_right"]["0.5"] == 1.0
    assert report.density["top_p"] == pytest.approx(dict.fromkeys(map(str, MASSES), 1.0))
