"""The linear layers of an 8B model on a GPU: cuBLAS against our kernels and the library quack.

``python -m benchmarks.products``. One row, as of a sequence that decodes alone: captured in a CUDA
graph that runs through more weights than the cache holds; ours is ``triton_single_row``, in every
configuration that is tried. The rows of a prompt's chunk: quack (a part of flash-attn-4) where it
is installed, which gates a product before it is written. Time of the product of gate and up
includes the activation.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import typer
from torch.nn import functional

from benchmarks.cuda_timing import Run, alternate, captured
from benchmarks.report import save
from service.models.kernels import triton_modules, triton_single_row
from service.models.kernels.operations import Projection
from service.models.kernels.triton_single_row import SingleRowConfig

_GATED = "gate and up"
_SHAPES = {  # outputs, inputs: Llama 3.1 8B
    "queries, keys, values": (6144, 4096),
    "attention's output": (4096, 4096),
    _GATED: (28672, 4096),
    "down": (4096, 14336),
    "logits": (128256, 4096),
}
_QUACK_TILES = (  # rows, outputs, whether two groups of warps take turns, tiles of a cluster
    (128, 256, False, (2, 1)),
    (128, 256, False, (1, 2)),
    (256, 128, False, (2, 1)),
    (256, 192, False, (2, 1)),
    (128, 192, True, (2, 1)),
)
_CYCLED_BYTES = 400e6  # several times what a cache holds
_TOLERANCE = 0.02  # two roundings of bfloat16, where outputs are largest
_TRIED = (  # ``SingleRowConfig``
    (4, 512, 4),
    (4, 1024, 4),
    (4, 2048, 8),
    (8, 512, 4),
    (8, 1024, 4),
    (8, 1024, 8),
    (16, 512, 4),
)
Product = Callable[[torch.Tensor, Projection], torch.Tensor]


def main(
    rounds: int = 5,
    *,
    rows: int = 8192,
    one_row: bool = True,
    quick: bool = False,
    write: bool = True,
) -> None:
    """Run the comparisons and print ratios first.

    Args:
        rounds: Turns of everybody; the median counts.
        rows: Rows of a prompt's chunk.
        one_row: Also compare products of one row.
        quick: Take three turns.
        write: Save the results as JSON.
    """
    if not torch.cuda.is_available():
        print("This benchmark needs a CUDA device.")
        raise typer.Exit(2)
    rounds = 3 if quick else rounds
    results: dict[str, Any] = {"device": torch.cuda.get_device_name()}
    for name, shape in _SHAPES.items() if one_row else ():
        results[f"{name}, one row"] = compare_one_row(name, shape, rounds)
        _report(f"{name}, one row", results, write=write)
    for name, shape in _SHAPES.items():
        if name != "logits":  # of a prompt's chunk only rows that give a token get any
            results[f"{name}, {rows} rows"] = compare_chunk(name, shape, rows, rounds)
            _report(f"{name}, {rows} rows", results, write=write)


def compare_one_row(name: str, shape: tuple[int, int], rounds: int) -> dict[str, float]:
    """Times of one row: cuBLAS, and ours in each configuration."""
    num_bytes = shape[0] * shape[1] * 2
    copies = [_projection(name, shape) for _ in range(max(1, round(_CYCLED_BYTES / num_bytes)))]
    row = torch.randn(1, shape[1], device="cuda", dtype=torch.bfloat16)
    contenders = {"cuBLAS": _cublas(name)} | {
        str(numbers): _ours(name, SingleRowConfig(*numbers)) for numbers in _TRIED
    }
    differences = _differences(contenders, row, copies[0])

    def over_all(contender: Product) -> Run:
        return captured(lambda: [contender(row, weights) for weights in copies])

    runs = {label: over_all(contender) for label, contender in contenders.items()}
    seconds = {label: s / len(copies) for label, s in alternate(runs, rounds).items()}
    return {
        **_ratios(seconds),
        "cuBLAS, TB/s": num_bytes / seconds["cuBLAS"] / 1e12,
        **{f"{label}, us": value * 1e6 for label, value in seconds.items()},
        **differences,
    }


def compare_chunk(
    name: str, shape: tuple[int, int], num_rows: int, rounds: int
) -> dict[str, float]:
    """Times of a prompt's chunk: cuBLAS by either of its interfaces, and quack."""
    projection = _projection(name, shape)
    rows = torch.randn(num_rows, shape[1], device="cuda", dtype=torch.bfloat16)
    contenders = {"cuBLAS": _cublas(name), "cuBLASLt": _by_cublaslt(_cublas(name))}
    contenders |= _quack(name)
    differences = _differences(contenders, rows, projection)
    runs = {label: partial(c, rows, projection) for label, c in contenders.items()}
    seconds = alternate(runs, rounds)
    operations = 2 * num_rows * shape[0] * shape[1]
    return {
        **_ratios(seconds),
        "cuBLAS, TFLOP/s": operations / seconds["cuBLAS"] / 1e12,
        **{f"{label}, ms": value * 1e3 for label, value in seconds.items()},
        **differences,
    }


def _ratios(seconds: dict[str, float]) -> dict[str, float]:
    """Of everybody to cuBLAS, the fastest first."""
    others = sorted(seconds.keys() - {"cuBLAS"}, key=seconds.__getitem__)
    return {f"ratio: cuBLAS / {label}": seconds["cuBLAS"] / seconds[label] for label in others}


def _projection(name: str, shape: tuple[int, int]) -> Projection:
    weight = torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.02
    num_parts = 2 if name == _GATED else 1
    return Projection(weight, None, (shape[0] // num_parts,) * num_parts)


def _cublas(name: str) -> Product:
    if name == _GATED:
        return _gated_in_two
    return lambda rows, projection: functional.linear(rows, projection.weight)


def _gated_in_two(rows: torch.Tensor, projection: Projection) -> torch.Tensor:
    """The product, and the pass that gates it."""
    both = functional.linear(rows, projection.weight)
    return triton_modules.gate(both, projection.sizes[0], "silu")


def _by_cublaslt(contender: Product) -> Product:
    def run(rows: torch.Tensor, projection: Projection) -> torch.Tensor:
        before = torch.backends.cuda.preferred_blas_library()
        torch.backends.cuda.preferred_blas_library("cublaslt")
        try:
            return contender(rows, projection)
        finally:
            torch.backends.cuda.preferred_blas_library(before)

    return run


def _ours(name: str, config: SingleRowConfig) -> Product:
    if name == _GATED:
        return lambda row, projection: triton_single_row.gated_product(
            row, projection, "silu", config
        )
    return lambda row, projection: triton_single_row.linear(row, projection, config)


def _quack(name: str) -> dict[str, Product]:
    """The library's products by default and in other tiles; compiling takes seconds for each."""
    try:
        from quack.gemm_config import GemmConfig
        from quack.gemm_interface import gemm, gemm_gated
    except ImportError as error:
        print(f"quack is left out: {error}")
        return {}
    if name != _GATED:
        return {"quack": lambda rows, projection: gemm(rows, projection.weight.T, tuned=False)}

    def gated(config: Any) -> Product:  # noqa: ANN401 - a type of the library
        return lambda rows, projection: gemm_gated(
            rows,
            projection.weight.T,
            activation="swiglu",
            store_preact=False,
            concat_layout=("B",),
            tuned=False,
            config=config,
        )[1]

    configs = {
        f"quack, {height} x {width}{', in turns' if in_turns else ''}, {cluster}": GemmConfig(
            height,
            width,
            pingpong=in_turns,
            is_dynamic_persistent=False,
            cluster_m=cluster[0],
            cluster_n=cluster[1],
        )
        for height, width, in_turns, cluster in _QUACK_TILES
    }
    return {"quack": gated(None)} | {name: gated(config) for name, config in configs.items()}


def _differences(
    contenders: dict[str, Product], rows: torch.Tensor, weights: Projection
) -> dict[str, float]:
    """How far each is from the first, and leave out who cannot run here or computes otherwise."""
    expected = next(iter(contenders.values()))(rows, weights).float()
    found = {}
    for label, contender in list(contenders.items())[1:]:
        try:
            distance = (contender(rows, weights).float() - expected).abs().max()
            difference = (distance / expected.abs().max()).item()
        except Exception as error:  # noqa: BLE001 - whatever a library says of a shape it has not
            print(f"{label} is left out: {type(error).__name__}: {str(error)[:200]}")
            del contenders[label]
            continue
        found[f"{label}, largest difference, share of the largest output"] = difference
        if not difference < _TOLERANCE:
            print(f"{label} is left out: it differs by {difference} of the largest output")
            del contenders[label]
    return found


def _report(name: str, results: dict[str, Any], *, write: bool) -> None:
    """Print a result, and save all so far: a library that crashes takes nothing with it."""
    print(f"\n{name}")
    for key, value in results[name].items():
        print(f"  {value:10.4g}  {key}", flush=True)
    if write:
        print(f"written to {save('products', results)}")


if __name__ == "__main__":
    typer.run(main)
