"""FlexAttention, a peer of the benchmarks, must be given the same work as our kernels."""

from dataclasses import replace

import pytest
import torch

from benchmarks.flex_attention import block_mask, contender
from sparse_methods.kernels import reference
from sparse_methods.kernels.operation import LayerGeometry
from tests.sparse_methods.kernels.cases import build, lists_of

BLOCK = 128
GEOMETRY = LayerGeometry(num_heads=4, num_kv_heads=2, head_dim=16, value_dim=16, scale=0.25)
READ = [[[0], [0]], [[0, 1], [1]], [[1, 2], [0, 2]], None]  # by tile and KV head; None is all


def prompt():
    return build(GEOMETRY, [(0, len(READ) * BLOCK)], BLOCK, torch.float32)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_it_computes_dense_attention(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    inputs = prompt()
    output = contender(inputs)()[0].transpose(0, 1)  # type: ignore[index]
    torch.testing.assert_close(output, reference.attend(inputs).output, atol=1e-5, rtol=1e-5)


def test_it_reads_the_blocks_that_are_listed():
    inputs = prompt()

    def choose(tile, head, visible):
        listed = READ[tile]
        return None if listed is None else listed[head]

    mask = block_mask(replace(inputs, lists=lists_of(inputs, choose)))
    expected = torch.zeros(4, 4, 4, dtype=torch.bool)
    for tile, row in enumerate(READ):
        for kv_head, blocks in enumerate(row or [range(4)] * 2):
            expected[2 * kv_head : 2 * kv_head + 2, tile, list(blocks)] = True
    assert torch.equal(mask.to_dense()[0].cpu().bool(), expected)
    # Only a tile's own block needs the mask of single keys.
    assert mask.kv_num_blocks[0, ::2].tolist() == [[1, 1, 1, 1]] * 2
    assert mask.full_kv_num_blocks is not None
    assert mask.full_kv_num_blocks[0, ::2].tolist() == [[0, 1, 1, 3], [0, 0, 1, 3]]
