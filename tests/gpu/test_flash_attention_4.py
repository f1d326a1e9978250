"""The library flash-attn-4 against the eager reference, on a device that it serves."""

import importlib.util
from dataclasses import replace

import pytest
import torch

from sparse_methods.kernels import reference
from sparse_methods.kernels.operation import LayerGeometry, QueryTiles, Tile
from tests.sparse_methods.kernels.cases import build, lists_of, on_float32

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        importlib.util.find_spec("flash_attn") is None, reason="needs the library flash-attn-4"
    ),
    pytest.mark.timeout(300),
    # The library and its compiler warn of themselves.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),
]
GEOMETRIES = {
    f"{heads} over {kv_heads} of {dim}": LayerGeometry(heads, kv_heads, dim, dim, scale=dim**-0.5)
    for heads, kv_heads, dim in [(8, 2, 128), (8, 8, 64), (6, 2, 96), (8, 1, 128)]
}
REQUESTS = {
    "one prompt": [(0, 1300)],
    "a later chunk": [(1024, 2000)],
    "whole blocks": [(0, 1024)],
    "several": [(0, 700), (512, 1100), (0, 90), (19, 800)],
}


@pytest.fixture(autouse=True)
def _short_prompts_too(monkeypatch):
    from sparse_methods.kernels import flash_attention_4

    monkeypatch.setattr(flash_attention_4, "_LEAST_SCORES", 0)


def check(inputs):
    from sparse_methods.kernels import flash_attention_4

    assert flash_attention_4._runs(inputs), "nothing here is for the library"
    expected = reference.attend(on_float32(inputs))
    result = flash_attention_4.attend(inputs)
    torch.testing.assert_close(result.output.float(), expected.output, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(result.lse, expected.lse, atol=2e-2, rtol=2e-2)
    assert torch.equal(result.blocks, expected.blocks)
    assert torch.equal(result.kv_elements, expected.kv_elements)


@pytest.mark.parametrize("requests", REQUESTS.values(), ids=REQUESTS)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_dense(geometry, requests):
    check(build(geometry, requests, 128, torch.bfloat16))


@pytest.mark.parametrize("requests", REQUESTS.values(), ids=REQUESTS)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_lists(geometry, requests):
    inputs = build(geometry, requests, 128, torch.bfloat16)

    def choose(tile, head, visible):
        if tile == 2:
            return None
        return sorted({visible[0], *visible[head % 2 :: 3], visible[-1]})

    check(replace(inputs, lists=lists_of(inputs, choose)))


@pytest.mark.parametrize("num_prompt_rows", [0, 30], ids=["at a block's end", "within a block"])
def test_generated_rows_beside_a_prompt(num_prompt_rows):
    inputs = build(GEOMETRIES["8 over 2 of 128"], [(0, 700), (512, 1100)], 128, torch.bfloat16)
    tiles = list(inputs.tiles.tiles)
    last = tiles.pop()
    if num_prompt_rows:
        tiles.append(last._replace(num_rows=num_prompt_rows))
    tiles += [
        Tile(last.first_row + row, 1, last.position + row, last.request, is_decode=True)
        for row in range(num_prompt_rows, last.num_rows)
    ]
    check(replace(inputs, tiles=QueryTiles(tuple(tiles), 128, inputs.tiles.device)))


def test_it_is_what_auto_takes_here():
    from sparse_methods.kernels import pick_implementation

    assert pick_implementation("auto", "cuda")[0] == "flash_attention_4"
