"""The kernels for prompts on Hopper against the eager reference."""

import math
from dataclasses import replace

import pytest
import torch

from sparse_methods.kernels import reference
from sparse_methods.kernels.operation import LayerGeometry
from tests.sparse_methods.kernels.cases import build, lists_of, on_float32

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
        reason="needs a Hopper device",
    ),
    pytest.mark.timeout(300),
]
GEOMETRIES = {
    f"{heads} over {kv_heads} of {dim}": LayerGeometry(heads, kv_heads, dim, dim, scale=dim**-0.5)
    for heads, kv_heads, dim in [(8, 2, 128), (4, 4, 64), (3, 1, 128)]
}
REQUESTS = {
    "one prompt": [(0, 1300)],
    "a later chunk": [(1024, 2000)],
    "several": [(0, 700), (512, 1100), (0, 90), (19, 800)],
}


def with_thresholds(geometry, requests, dtype, is_diagonal_first):
    """Every second page is faint; thresholds cycle, one of them is off."""
    inputs = build(geometry, requests, 128, dtype)
    inputs.keys[::2] *= 0.05
    count = len(inputs.tiles.tiles)
    logs = [math.log(0.3), math.log(0.01), -math.inf, math.log(0.7)]
    cycled = torch.tensor((logs * count)[:count], device="cuda")
    order = torch.arange(count, device="cuda") % 3 != 2
    inputs = replace(inputs, query=inputs.query * 4.0, log_thresholds=cycled)
    return replace(inputs, diagonal_first=order) if is_diagonal_first else inputs


def expected_and_result(inputs):
    from sparse_methods.kernels import gluon_prefill, triton_attention

    assert gluon_prefill.serves(inputs)
    expected = reference.attend(on_float32(inputs))
    result = triton_attention.attend(inputs)
    torch.testing.assert_close(result.output.float(), expected.output, atol=3e-2, rtol=3e-2)
    torch.testing.assert_close(result.lse, expected.lse, atol=2e-2, rtol=2e-2)
    return expected, result


def check(inputs):
    expected, result = expected_and_result(inputs)
    assert torch.equal(result.blocks, expected.blocks)


def check_skipping(inputs):
    expected, result = expected_and_result(inputs)
    # Scores of 16-bit products may fall on the other side of a threshold, very rarely.
    assert torch.equal(result.blocks[..., :2], expected.blocks[..., :2])
    assert (result.blocks[..., 2] != expected.blocks[..., 2]).float().mean() < 0.02
    assert 0 < result.blocks[..., 2].sum() < result.blocks[..., 1].sum()


def computed(inputs, tiles):
    """[rows, heads, dim] outputs of some tiles; the others' are NaN."""
    from sparse_methods.kernels.triton_prefill import prefill
    from sparse_methods.kernels.triton_workspace import Workspace

    workspace = Workspace.allocate(inputs)
    workspace.output.fill_(math.nan)
    prefill(inputs, torch.tensor(list(tiles), dtype=torch.int32, device="cuda"), workspace)
    return workspace.output


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("requests", REQUESTS.values(), ids=REQUESTS)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_dense(geometry, requests, dtype):
    check(build(geometry, requests, 128, dtype))


@pytest.mark.parametrize("requests", REQUESTS.values(), ids=REQUESTS)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_lists(geometry, requests):
    inputs = build(geometry, requests, 128, torch.bfloat16)

    def choose(tile, head, visible):
        return None if tile == 2 else sorted({visible[0], *visible[head % 2 :: 2], visible[-1]})

    check(replace(inputs, lists=lists_of(inputs, choose)))


def test_a_list_of_one_block_of_any_place():
    inputs = build(GEOMETRIES["8 over 2 of 128"], [(0, 1300), (0, 300)], 128, torch.bfloat16)

    def choose(tile, head, visible):
        return [visible[(tile + head) % len(visible)]]

    check(replace(inputs, lists=lists_of(inputs, choose)))


@pytest.mark.parametrize("has_thresholds", [False, True])
def test_a_tile_does_not_depend_on_the_others(has_thresholds):
    geometry, requests = GEOMETRIES["8 over 2 of 128"], REQUESTS["several"]
    inputs = build(geometry, requests, 128, torch.bfloat16)
    if has_thresholds:
        inputs = with_thresholds(geometry, requests, torch.bfloat16, is_diagonal_first=True)
    together = computed(inputs, range(len(inputs.tiles.tiles)))
    for number, tile in enumerate(inputs.tiles.tiles):
        rows = slice(tile.first_row, tile.first_row + tile.num_rows)
        assert torch.equal(computed(inputs, [number])[rows], together[rows])
    assert not together.isnan().any()


@pytest.mark.parametrize("has_thresholds", [False, True])
def test_an_empty_list_keeps_nobody_waiting(has_thresholds):
    """It is not allowed, but an operator must not lose a device to it."""
    geometry = GEOMETRIES["8 over 2 of 128"]
    inputs = build(geometry, [(0, 512)], 128, torch.bfloat16)
    if has_thresholds:
        inputs = with_thresholds(geometry, [(0, 512)], torch.bfloat16, is_diagonal_first=False)
    lists = lists_of(inputs, lambda tile, head, visible: [] if tile == 1 else visible)
    output, expected = (computed(each, range(4)) for each in (replace(inputs, lists=lists), inputs))
    torch.testing.assert_close(output[256:], expected[256:])


@pytest.mark.parametrize("is_diagonal_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("requests", REQUESTS.values(), ids=REQUESTS)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_thresholds(geometry, requests, dtype, is_diagonal_first):
    check_skipping(with_thresholds(geometry, requests, dtype, is_diagonal_first))


@pytest.mark.parametrize("requests", REQUESTS.values(), ids=REQUESTS)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_thresholds_and_lists(geometry, requests):
    inputs = with_thresholds(geometry, requests, torch.bfloat16, is_diagonal_first=True)

    def choose(tile, head, visible):
        return None if tile == 2 else sorted({visible[0], *visible[head % 2 :: 2], visible[-1]})

    check_skipping(replace(inputs, lists=lists_of(inputs, choose)))
