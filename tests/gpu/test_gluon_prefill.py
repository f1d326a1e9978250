"""The kernels for prompts on Hopper against the eager reference."""

import math
import random
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
    pytest.mark.timeout(300, method="thread"),  # who waits for a device does not hear signals
]
GEOMETRIES = {
    f"{heads} over {kv_heads} of {dim}": LayerGeometry(heads, kv_heads, dim, dim, scale=dim**-0.5)
    for heads, kv_heads, dim in [(8, 2, 128), (4, 4, 64), (3, 1, 128), (8, 1, 64)]
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


def computed(inputs, tiles, config=None, *, before=math.nan):
    """A workspace in which all but the results of some tiles is as before."""
    from sparse_methods.kernels import gluon_prefill
    from sparse_methods.kernels.triton_prefill import prefill
    from sparse_methods.kernels.triton_workspace import Workspace

    assert config is not None or gluon_prefill.serves(inputs)
    workspace = Workspace.allocate(inputs)
    workspace.output.fill_(before)
    workspace.lse.fill_(before)
    indices = torch.tensor(list(tiles), dtype=torch.int32, device="cuda")
    prefill(inputs, indices, workspace, config)
    return workspace


def choose_some(tile, head, visible):
    return None if tile == 2 else sorted({visible[0], *visible[head % 2 :: 2], visible[-1]})


def choose_in_disorder(tile, head, visible):
    """Some blocks in any order, among them what the tile does not see or what is no block."""
    dice = random.Random(100 * tile + head)
    chosen = dice.sample(visible, dice.randint(1, len(visible)))
    chosen += dice.sample([-1, -7, visible[-1] + 1, 9999, -(2**31), 2**31 - 1], dice.randint(0, 4))
    dice.shuffle(chosen)
    return None if tile == 2 else chosen


CHOICES = [choose_some, choose_in_disorder]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("requests", REQUESTS.values(), ids=REQUESTS)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_dense(geometry, requests, dtype):
    check(build(geometry, requests, 128, dtype))


@pytest.mark.parametrize("choose", CHOICES)
@pytest.mark.parametrize("requests", REQUESTS.values(), ids=REQUESTS)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_lists(geometry, requests, choose):
    inputs = build(geometry, requests, 128, torch.bfloat16)
    check(replace(inputs, lists=lists_of(inputs, choose)))


def test_a_list_of_one_block_of_any_place():
    inputs = build(GEOMETRIES["8 over 2 of 128"], [(0, 1300), (0, 300)], 128, torch.bfloat16)

    def choose(tile, head, visible):
        return [visible[(tile + head) % len(visible)]]

    check(replace(inputs, lists=lists_of(inputs, choose)))


def some_tiles(requests, *, has_thresholds=False, has_lists=False):
    geometry = GEOMETRIES["8 over 2 of 128"]
    inputs = build(geometry, requests, 128, torch.bfloat16)
    if has_thresholds:
        inputs = with_thresholds(geometry, requests, torch.bfloat16, is_diagonal_first=True)
    return replace(inputs, lists=lists_of(inputs, choose_some)) if has_lists else inputs


@pytest.mark.parametrize("has_lists", [False, True])
@pytest.mark.parametrize("has_thresholds", [False, True])
def test_a_tile_does_not_depend_on_the_others_nor_write_theirs(has_thresholds, has_lists):
    inputs = some_tiles(REQUESTS["several"], has_thresholds=has_thresholds, has_lists=has_lists)
    together = computed(inputs, range(len(inputs.tiles.tiles)))
    assert not together.output.isnan().any()
    for number, tile in enumerate(inputs.tiles.tiles):
        alone = computed(inputs, [number])
        is_own = torch.zeros(len(inputs.query), dtype=torch.bool, device="cuda")
        is_own[tile.first_row : tile.first_row + tile.num_rows] = True
        for result, expected in ((alone.output, together.output), (alone.lse, together.lse)):
            assert torch.equal(result[is_own], expected[is_own])
            assert result[~is_own].isnan().all()


@pytest.mark.parametrize("has_thresholds", [False, True])
def test_an_empty_list_keeps_nobody_waiting(has_thresholds):
    """It is not allowed, but an operator must not lose a device to it."""
    inputs = some_tiles([(0, 512)], has_thresholds=has_thresholds)
    lists = lists_of(inputs, lambda tile, head, visible: [] if tile == 1 else visible)
    listed = replace(inputs, lists=lists, diagonal_first=None)
    output = computed(listed, range(4), before=0.0).output
    expected = computed(replace(inputs, diagonal_first=None), range(4)).output
    for rows in (slice(0, 128), slice(256, 512)):
        torch.testing.assert_close(output[rows], expected[rows])
    assert output[128:256].isnan().all()


@pytest.mark.parametrize("has_lists", [False, True])
@pytest.mark.parametrize("has_thresholds", [False, True])
def test_the_kernels_that_take_over_compute_the_same(has_thresholds, has_lists):
    from sparse_methods.kernels.triton_prefill import default_config

    inputs = some_tiles(REQUESTS["several"], has_thresholds=has_thresholds, has_lists=has_lists)
    tiles = range(len(inputs.tiles.tiles))
    ours, others = (computed(inputs, tiles, c) for c in (None, default_config(inputs)))
    # Scores beside a threshold may fall on the other side, which no tolerance of sums covers.
    is_close = torch.isclose(ours.output, others.output, atol=2e-2, rtol=2e-2).all(-1)
    far = ~is_close | ((ours.lse - others.lse).abs() > 1e-3)
    assert far.float().mean() <= (0.05 if has_thresholds else 0.0)
    expected = reference.attend(on_float32(inputs))
    torch.testing.assert_close(others.output.float(), expected.output, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("change", ["strided", "not aligned"])
def test_caches_that_cannot_be_addressed_in_place_are_left_to_triton(change):
    from sparse_methods.kernels import gluon_prefill, triton_attention

    inputs = some_tiles([(0, 300)])
    wide = torch.zeros(*inputs.keys.shape[:3], 256, dtype=torch.bfloat16, device="cuda")
    apart = wide[..., :128]
    if change == "not aligned":
        apart = wide.flatten()[1 : 1 + inputs.keys.numel()].view_as(inputs.keys)
    apart.copy_(inputs.keys)
    changed = replace(inputs, keys=apart)
    assert not gluon_prefill.serves(changed)
    result = triton_attention.attend(changed)
    expected = computed(inputs, range(len(inputs.tiles.tiles))).output
    torch.testing.assert_close(result.output, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("is_diagonal_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("requests", REQUESTS.values(), ids=REQUESTS)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_thresholds(geometry, requests, dtype, is_diagonal_first):
    check_skipping(with_thresholds(geometry, requests, dtype, is_diagonal_first))


@pytest.mark.parametrize("choose", CHOICES)
@pytest.mark.parametrize("requests", REQUESTS.values(), ids=REQUESTS)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_thresholds_and_lists(geometry, requests, choose):
    inputs = with_thresholds(geometry, requests, torch.bfloat16, is_diagonal_first=True)
    check_skipping(replace(inputs, lists=lists_of(inputs, choose)))
