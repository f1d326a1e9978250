"""What the layers of a step read is counted once, exactly, when all of them ran."""

from dataclasses import replace

import pytest
import torch

from service.models.attention import AttentionBatch, PagedAttention
from sparse_methods.kernels import reference
from sparse_methods.kernels.operation import (
    AttentionOutputs,
    LayerGeometry,
    PageTable,
    QueryTiles,
    Tile,
)

BLOCK = 8
GEOMETRY = LayerGeometry(num_heads=4, num_kv_heads=2, head_dim=16, value_dim=16, scale=0.25)
TILES = (Tile(0, 3, 8, 0, is_decode=False), Tile(3, 1, 17, 1, is_decode=True))
ROWS = torch.tensor([2, 5])  # request slots 1 and 2; prompt and generated


def attention_of(geometries, implementation=reference.attend):
    caches: list[tuple[torch.Tensor, torch.Tensor]] = [
        (torch.randn(8, BLOCK, g.num_kv_heads, 16), torch.randn(8, BLOCK, g.num_kv_heads, 16))
        for g in geometries
    ]
    return PagedAttention(geometries, caches, implementation, num_slots=4)


def batch_of(**changes):
    return replace(
        AttentionBatch(
            slot_mapping=torch.tensor([8, 9, 10, 41]),
            page_table=PageTable(torch.tensor([[0, 1, 0], [3, 4, 5]])),
            tiles=QueryTiles(TILES, BLOCK, torch.device("cpu")),
            counter_rows=ROWS,
        ),
        **changes,
    )


def run(attention, geometries, batch):
    with attention.running(batch):
        for layer, geometry in enumerate(geometries):
            query, keys = torch.randn(4, geometry.num_heads, 16), torch.randn(4, 2, 16)
            attention.forward(layer, query, keys, keys, None)


def spied(seen):
    def attend(inputs):
        outputs = reference.attend(inputs)
        seen.append((outputs.blocks.clone(), outputs.kv_elements.clone()))
        return outputs

    return attend


@pytest.mark.parametrize(
    "geometries",
    [
        [GEOMETRY] * 3,
        [GEOMETRY, replace(GEOMETRY, window=5), GEOMETRY],
        [GEOMETRY, replace(GEOMETRY, num_heads=2)],
    ],
    ids=["all alike", "two kinds", "other heads"],
)
@pytest.mark.parametrize("log_threshold", [None, -0.5])
def test_counters_are_the_sums_of_what_each_layer_counted(geometries, log_threshold):
    seen = []
    attention = attention_of(geometries, spied(seen))
    thresholds = None if log_threshold is None else torch.full((2,), log_threshold)
    for _ in range(2):
        run(attention, geometries, batch_of(log_thresholds=thresholds))
    blocks = torch.zeros_like(attention.block_counters)
    elements = torch.zeros_like(attention.element_counters)
    for index, (counted, read) in enumerate(seen):
        layer = index % len(geometries)
        blocks[layer, ROWS, : counted.shape[1]] += counted
        elements[layer, ROWS] += read
    assert torch.equal(attention.block_counters, blocks)
    assert torch.equal(attention.element_counters, elements)
    assert blocks[:, ROWS].any()


def test_tiles_of_one_request_add_up():
    attention = attention_of([GEOMETRY])
    run(attention, [GEOMETRY], batch_of(counter_rows=torch.tensor([2, 2])))
    once = attention_of([GEOMETRY])
    run(once, [GEOMETRY], batch_of())
    assert torch.equal(attention.block_counters[:, 2], once.block_counters[:, ROWS].sum(1))


def test_a_step_that_fails_counts_nothing():
    def fail_in_the_second_layer(inputs):
        if inputs.geometry.window:
            raise RuntimeError("out of memory")
        return reference.attend(inputs)

    geometries = [GEOMETRY, replace(GEOMETRY, window=5)]
    attention = attention_of(geometries, fail_in_the_second_layer)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(attention, geometries, batch_of())
    assert not attention.block_counters.any()
    attention.implementation = reference.attend
    run(attention, geometries, batch_of())
    other = attention_of(geometries)
    run(other, geometries, batch_of())
    assert torch.equal(attention.block_counters, other.block_counters)


def test_outputs_of_earlier_layers_are_not_kept():
    kept = []

    def attend(inputs) -> AttentionOutputs:
        kept.append(len(attention._counted))
        assert all(len(counted) == 2 for counted in attention._counted)
        return reference.attend(inputs)

    attention = attention_of([GEOMETRY] * 2, attend)
    run(attention, [GEOMETRY] * 2, batch_of())
    assert kept == [0, 1]
    assert not attention._counted
