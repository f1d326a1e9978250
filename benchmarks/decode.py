"""Decode attention of one layer on a GPU: our kernel against PyTorch's cuDNN attention.

A step is captured in a CUDA graph and replayed, as the engine does; contenders alternate, and the
median of their rounds counts. Bytes are the keys and values that dense attention reads.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch
import typer
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cuda_timing import Run, alternate, captured, seconds_of
from benchmarks.report import save
from sparse_methods.kernels.operation import (
    AttentionInputs,
    BlockLists,
    LayerGeometry,
    PageTable,
    QueryTiles,
    Tile,
)

_GEOMETRY = LayerGeometry(
    num_heads=32, num_kv_heads=8, head_dim=128, value_dim=128, scale=128**-0.5
)
_PAGE = 128
_SHAPES = ((1, 131072), (8, 32768), (32, 8192))
_TRIED = tuple(
    product((4, 8, 16), (1, 4, 16, 64), (2,), (64,), (4,), (2, 3, 4))
)  # ``DecodeConfig``
_TRIED_QUICKLY = tuple(product((8,), (1, 4, 16), (2,), (64,), (4,), (3,)))


def main(rounds: int = 7, *, quick: bool = False, write: bool = True) -> None:
    """Run the comparisons and print ratios first."""
    if not torch.cuda.is_available():
        print("This benchmark needs a CUDA device.")
        raise typer.Exit(2)
    results: dict[str, Any] = {"device": torch.cuda.get_device_name()}
    for batch, length in _SHAPES:
        results[f"{batch} x {length}"] = result = compare(batch, length, 3 if quick else rounds)
        _print(f"{batch} x {length}", result)
    results["configurations"] = tried = configurations(_TRIED_QUICKLY if quick else _TRIED)
    _print("configurations", tried)
    if write:
        print(f"\nwritten to {save('decode', results)}")


def compare(batch: int, length: int, rounds: int) -> dict[str, float]:
    """Times of one shape, and what follows from them."""
    inputs = build(batch, length)
    eighth = replace(inputs, lists=_lists(inputs, one_in=8))
    peaked = replace(inputs, query=_peaked_query(inputs))
    off, on = (torch.full((batch,), value, device="cuda") for value in (float("-inf"), -6.9))
    contenders = {
        "SDPA, cuDNN": _sdpa(inputs),
        "dense": _ours(inputs),
        "lists of 1/8 of the pages": _ours(eighth),
        "thresholds that skip nothing": _ours(replace(peaked, log_thresholds=off)),
        "thresholds that skip": _ours(replace(peaked, log_thresholds=on)),
    }
    seconds = alternate({name: captured(run) for name, run in contenders.items()}, rounds)
    num_bytes = 2 * batch * length * _GEOMETRY.num_kv_heads * _GEOMETRY.head_dim * 2
    dense = seconds["dense"]
    return {
        "ratio: dense / SDPA, speed": seconds["SDPA, cuDNN"] / dense,
        "ratio: lists of 1/8 / dense, speed (goal >= 5)": dense
        / seconds["lists of 1/8 of the pages"],
        "ratio: skipping / dense, speed": dense / seconds["thresholds that skip"],
        "share of block values skipped": _skipped_share(replace(peaked, log_thresholds=on)),
        "dense, TB/s (goal >= 2.6)": num_bytes / dense / 1e12,
        "SDPA, TB/s": num_bytes / seconds["SDPA, cuDNN"] / 1e12,
        **{f"{name}, us": value * 1e6 for name, value in seconds.items()},
    }


def configurations(tried: Sequence[tuple[int, ...]]) -> dict[str, float]:
    """Microseconds of each configuration: dense, and with lists of 1/8 of the pages."""
    from sparse_methods.kernels.triton_decode import DecodeConfig

    shapes = (*_SHAPES, (1, 1024), (32, 1024), (128, 1024))
    cases = {
        name: case
        for tensors, shape in ((build(*shape), f"{shape[0]} x {shape[1]}") for shape in shapes)
        for name, case in (
            (f"dense {shape}", tensors),
            (f"1/8 {shape}", replace(tensors, lists=_lists(tensors, one_in=8))),
        )
    }
    names = "split {} least {} scored {} step {} warps {} stages {}"
    results = {}
    for numbers in tried:
        for name, case in cases.items():
            try:
                run = captured(_ours(case, DecodeConfig(*numbers)))
            except Exception as error:  # noqa: BLE001 - more shared memory than the device has
                print(f"{names.format(*numbers)}: {type(error).__name__}")
                break
            results[f"{names.format(*numbers)}, {name}"] = (
                min(seconds_of(run) for _ in range(3)) * 1e6
            )
    return results


def build(batch: int, length: int) -> AttentionInputs:
    """Rows that each see ``length`` keys on shuffled pages."""
    torch.manual_seed(0)
    num_pages = length // _PAGE
    shape = (batch * num_pages, _PAGE, _GEOMETRY.num_kv_heads, _GEOMETRY.head_dim)
    keys, values = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    table = torch.randperm(batch * num_pages, device="cuda").view(batch, num_pages)
    tiles = tuple(Tile(row, 1, length - 1, row, is_decode=True) for row in range(batch))
    query = torch.randn(batch, _GEOMETRY.num_heads, _GEOMETRY.head_dim, device="cuda")
    return AttentionInputs(
        query=query.bfloat16(),
        keys=keys,
        values=values,
        page_table=PageTable(table),
        tiles=QueryTiles(tiles, _PAGE, torch.device("cuda")),
        geometry=_GEOMETRY,
    )


def _lists(inputs: AttentionInputs, one_in: int) -> BlockLists:
    """Every eighth page or so, ascending, with room for all, as methods make lists."""
    batch, num_pages = inputs.page_table.pages.shape
    shape = (batch, _GEOMETRY.num_kv_heads, num_pages)
    order = torch.rand(shape, device="cuda").argsort(-1)
    count = num_pages // one_in
    order[..., :count] = order[..., :count].sort(-1).values
    counts = torch.full(shape[:2], count, dtype=torch.int32, device="cuda")
    return BlockLists(order.int(), counts)


def _peaked_query(inputs: AttentionInputs) -> torch.Tensor:
    """Queries that look at the first key, so that blocks far from it fall below a threshold."""
    first = inputs.keys[inputs.page_table.pages[:, 0], 0].float()  # [batch, Hkv, D]
    query = first.repeat_interleave(_GEOMETRY.group_size, 1)
    return (query + 0.1 * inputs.query.float()).bfloat16()


def _skipped_share(inputs: AttentionInputs) -> float:
    from sparse_methods.kernels.triton_decode import decode
    from sparse_methods.kernels.triton_workspace import Workspace

    workspace = Workspace.allocate(inputs)
    decode(inputs, inputs.tiles.decode_indices, workspace)
    return workspace.skipped.float().mean().item() / inputs.page_table.pages.shape[1]


def _ours(inputs: AttentionInputs, config: Any = None) -> Run:  # noqa: ANN401 - needs Triton
    from sparse_methods.kernels.triton_decode import decode
    from sparse_methods.kernels.triton_workspace import Workspace

    workspace = Workspace.allocate(inputs)
    return lambda: decode(inputs, inputs.tiles.decode_indices, workspace, config)


def _sdpa(inputs: AttentionInputs) -> Run:
    """The peer on its own layout: keys of a head side by side, groups formed by the operator."""
    batch = inputs.query.shape[0]
    keys, values = (
        pages.view(batch, -1, *pages.shape[2:]).transpose(1, 2).contiguous()
        for pages in (inputs.keys, inputs.values)
    )
    query = inputs.query[:, :, None]

    def run() -> object:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    return run


def _print(name: str, result: dict[str, float]) -> None:
    print(f"\n{name}")
    for key, value in result.items():
        print(f"  {key:64s} {value:10.3f}")


if __name__ == "__main__":
    typer.run(main)
