import pytest
import torch

from sparse_methods import Phase
from sparse_methods.statistics import (
    PHASES,
    LayerStatistics,
    PhaseStatistics,
    RequestStatistics,
    read_statistics,
)


def counters(num_heads: tuple[int, ...] = (2, 1)) -> tuple[torch.Tensor, torch.Tensor]:
    """Two layers; head h of layer l in phase p has total 100, selected 50 + 10 l + h, skipped p."""
    blocks = torch.zeros(len(num_heads), len(PHASES), max(num_heads), 3, dtype=torch.int64)
    for layer, heads in enumerate(num_heads):
        for phase in range(len(PHASES)):
            for head in range(heads):
                blocks[layer, phase, head] = torch.tensor([100, 50 + 10 * layer + head, phase])
    kv_bytes = torch.tensor([[[0, 0], [300, 400]], [[0, 0], [100, 400]]])
    return blocks, kv_bytes


def test_density_is_what_was_computed_over_what_was_visible():
    phase = PhaseStatistics(blocks_total=8, blocks_selected=6, blocks_skipped=2)
    assert phase.density == 0.5
    assert phase.sparsity == 0.5


def test_nothing_visible_is_dense_not_a_division_by_zero():
    assert PhaseStatistics().density == 1.0
    assert PhaseStatistics().sparsity == 0.0


def test_counters_are_added_and_ratios_are_never_averaged():
    short = PhaseStatistics(2, 1, 0, 10, 20)
    long = PhaseStatistics(98, 98, 0, 100, 200)
    total = short + long
    assert total == PhaseStatistics(100, 99, 0, 110, 220)
    assert total.density == 0.99
    assert total.density != (short.density + long.density) / 2


def test_reading_counters_sums_heads_into_phases_and_keeps_bytes_once():
    statistics = read_statistics(*counters(), [2, 1])
    first, second = statistics.layers
    assert (first.layer, second.layer) == (0, 1)
    assert first.phases[Phase.PREFILL] == PhaseStatistics(200, 101, 0)
    assert first.phases[Phase.DECODE] == PhaseStatistics(200, 101, 2, 300, 400)
    assert second.phases[Phase.DECODE] == PhaseStatistics(100, 60, 1, 100, 400)


def test_each_query_head_keeps_its_own_counters_and_padding_heads_are_not_read():
    blocks, kv_bytes = counters()
    blocks[1, :, 1] = 999  # layer 1 has one head; the rest of its row is padding
    statistics = read_statistics(blocks, kv_bytes, [2, 1])
    assert [h[Phase.PREFILL].blocks_selected for h in statistics.layers[0].heads] == [50, 51]
    assert len(statistics.layers[1].heads) == 1
    assert statistics.layers[1].phases[Phase.PREFILL].blocks_total == 100


def test_a_request_sums_its_layers_by_phase_and_overall():
    statistics = read_statistics(*counters(), [2, 1])
    assert statistics.phase(Phase.PREFILL) == PhaseStatistics(300, 161, 0)
    assert statistics.phase(Phase.DECODE) == PhaseStatistics(300, 161, 3, 400, 800)
    assert statistics.overall == PhaseStatistics(600, 322, 3, 400, 800)
    assert 0 < statistics.overall.sparsity < 1


def test_two_requests_add_layer_by_layer_and_head_by_head():
    one = read_statistics(*counters(), [2, 1])
    both = one + one
    assert both.overall == one.overall + one.overall
    assert both.layers[0].heads[1][Phase.DECODE] == PhaseStatistics(200, 102, 2)
    assert [layer.layer for layer in both.layers] == [0, 1]


def test_the_empty_statistics_are_neutral():
    one, empty = read_statistics(*counters(), [2, 1]), RequestStatistics()
    assert one + empty == one
    assert empty + one == one
    assert (empty + empty).overall.density == 1.0


def test_requests_of_different_models_do_not_add():
    two_layers = read_statistics(*counters(), [2, 1])
    one_layer = RequestStatistics((LayerStatistics(0, two_layers.layers[0].phases),))
    with pytest.raises(ValueError, match="shorter"):
        two_layers + one_layer
