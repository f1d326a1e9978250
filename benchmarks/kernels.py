"""Prefill attention of one layer on a GPU: our implementations against cuDNN.

Dense attention, block lists of known density (given, and selected in the time that counts), and
thresholds on clustered queries and keys of which a known share of tiles scores far below the row's
maximum: random ones would skip nothing and prove nothing. Ours reads shuffled pages; its time
includes what it counts and allocates. FlexAttention computes dense attention and given lists beside
it, and flash-attn-4 dense attention by itself where it is installed.
"""

import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
import typer
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.errors import TritonError

from benchmarks import flex_attention
from benchmarks.cuda_timing import alternate_for
from benchmarks.report import save
from sparse_methods import SparseAttentionMethod, get_sparse_method
from sparse_methods.kernels import Implementation, pick_implementation
from sparse_methods.kernels.operation import (
    AttentionInputs,
    AttentionOutputs,
    BlockLists,
    LayerGeometry,
    PageTable,
    QueryTiles,
    Tile,
)
from sparse_methods.kernels.page_summary import PageSegments, allocate_summaries, update_summaries
from sparse_methods.kernels.triton_prefill import PrefillConfig, prefill
from sparse_methods.kernels.triton_workspace import Workspace
from sparse_methods.views import Phase, PrefillView

_GEOMETRY = LayerGeometry(
    num_heads=32, num_kv_heads=8, head_dim=128, value_dim=128, scale=128**-0.5
)
_PAGE = 128
_LENGTHS = (8192, 32768, 131072)
_DENSITIES = (0.26, 0.11)
_SKIPPED_SHARES = (0.49, 0.73, 0.88)
_NUM_CLUSTERS = 32  # directions of queries; each key is near some of them
_CLUSTERED_KEYS = 256
_THRESHOLD = 1e-3
_VARIANTS = [
    PrefillConfig(num_warps, num_stages, sub_tile, use_tma=use_tma, split_loops=split_loops)
    for num_warps, num_stages, sub_tile in [(8, 2, 128), (8, 3, 128), (8, 3, 64), (4, 3, 64)]
    for use_tma in (False, True)
    for split_loops in (True, False)
] + [PrefillConfig(8, stages, 128, use_tma=True, warp_specialize=True) for stages in (2, 3)]
_LISTED_VARIANTS = [
    PrefillConfig(8, num_stages, sub_tile, use_tma=use_tma)
    for num_stages, sub_tile in [(2, 128), (3, 128), (3, 64)]
    for use_tma in (False, True)
]
_SKIPPING_VARIANTS = [
    PrefillConfig(8, num_stages, 128, use_tma=use_tma, in_pairs=in_pairs)
    for num_stages in (1, 2, 3)
    for use_tma in (False, True)
    for in_pairs in (False, True)
]
Run = Callable[[], Any]


def main(*, quick: bool = False, warmup: bool = False, write: bool = True) -> None:
    """Run the comparisons and print ratios first.

    Args:
        quick: Measure for a few seconds each, and leave out the longest prompt.
        warmup: Also time the ways to compile the kernel, at 32768 tokens.
        write: Save the results as JSON.
    """
    if not torch.cuda.is_available():
        print("This benchmark needs a CUDA device.")
        raise typer.Exit(2)
    rep_ms = 100 if quick else 1000
    results: dict[str, Any] = {"device": torch.cuda.get_device_name()}
    for length in _LENGTHS[:2] if quick else _LENGTHS:
        _report(results, f"dense {length}", dense(length, rep_ms))
    inputs = build(32768)
    cudnn = _cudnn(inputs)
    for density in _DENSITIES:
        _report(results, f"lists at density {density}", lists(inputs, density, cudnn, rep_ms))
        method = get_sparse_method("block_topk")({"keep_ratio": density - 0.01, "dense_below": 0})
        _report(results, f"block_topk at {density}", selected(inputs, method, cudnn, rep_ms))
    knobs = {"threshold": _THRESHOLD, "dense_below": 0}
    method = get_sparse_method("predictive_skip")(knobs)
    by_lists = get_sparse_method("predictive_skip")({**knobs, "apply_threshold": False})
    for share in _SKIPPED_SHARES:
        clustered = _clustered(inputs, share)
        _report(results, f"thresholds, {share} skipped", skipping(clustered, cudnn, rep_ms))
        _report(results, f"predictive_skip, {share}", selected(clustered, method, cudnn, rep_ms))
        alike = _clustered(inputs, share, of_groups=True)
        for name, asked in (("", method), (", lists alone", by_lists)):
            _report(
                results,
                f"predictive_skip, {share}, groups alike{name}",
                selected(alike, asked, cudnn, rep_ms),
            )
    if warmup:
        _report(results, "dense 32768, ms", variants(inputs, _VARIANTS, rep_ms))
        listed = replace(inputs, lists=_random_lists(inputs, 0.26))
        _report(results, "lists at 0.26, ms", variants(listed, _LISTED_VARIANTS, rep_ms))
        clustered = _clustered(inputs, 0.73)
        _report(results, "0.73 skipped, ms", variants(clustered, _SKIPPING_VARIANTS, rep_ms))
    if write:
        print(f"\nwritten to {save('kernels', results)}")


def implementations() -> dict[str, Implementation]:
    """Ours by name: Triton, and what ``auto`` takes if that is another."""
    return dict(pick_implementation(name, "cuda") for name in ("triton", "auto"))


def dense(length: int, rep_ms: int) -> dict[str, float]:
    """Ours and the peers on a whole prompt."""
    inputs = build(length)
    peers = {"cuDNN": _cudnn(inputs)} | _flex_attention(inputs)
    if importlib.util.find_spec("flash_attn") is not None:
        peers["flash-attn-4"] = _flash_attn_4(inputs)
    ours = {name: partial(attend, inputs) for name, attend in implementations().items()}
    times = alternate_for(peers | ours, rep_ms)
    expected = peers["cuDNN"]()[0].transpose(0, 1)
    result: dict[str, float] = {}
    for name, attend in ours.items():
        result |= {f"ratio: {name} over {peer}": times[peer] / times[name] for peer in peers}
        difference = (attend().output - expected).abs().max().item()
        result[f"{name}, largest difference to cuDNN"] = difference
    tera_flop = 2 * length * length * _GEOMETRY.num_heads * _GEOMETRY.head_dim / 1e12
    for name, time in times.items():
        result |= {f"{name}, ms": time, f"{name}, TFLOP/s": tera_flop / time * 1e3}
    return result


def lists(inputs: AttentionInputs, density: float, cudnn: Run, rep_ms: int) -> dict[str, float]:
    """Random block lists that are given, not selected."""
    listed = replace(inputs, lists=_random_lists(inputs, density))
    return _compare(lambda attend: attend(listed), cudnn, rep_ms, _flex_attention(listed))


def skipping(clustered: AttentionInputs, cudnn: Run, rep_ms: int) -> dict[str, float]:
    """A threshold that drops a known share of tiles, by both visiting orders."""
    first = torch.ones(len(clustered.tiles.tiles), dtype=torch.bool, device="cuda")
    ordered = replace(clustered, diagonal_first=first)
    left_to_right = _compare(lambda attend: attend(clustered), cudnn, rep_ms)
    diagonal_first = _compare(lambda attend: attend(ordered), cudnn, rep_ms)
    return left_to_right | {f"{key}, diagonal first": v for key, v in diagonal_first.items()}


def selected(
    inputs: AttentionInputs, method: SparseAttentionMethod, cudnn: Run, rep_ms: int
) -> dict[str, float]:
    """A method that chooses its blocks, choosing included."""
    pages = inputs.page_table.pages[0]
    summaries = allocate_summaries(inputs.keys)
    ones = torch.ones_like(pages)
    keys = inputs.keys[pages].flatten(0, 1)
    update_summaries(summaries, keys, PageSegments(pages, ones * _PAGE, ones < 0))
    view = PrefillView(
        query=inputs.query,
        keys=inputs.keys,
        pages=pages,
        position=0,
        prompt_len=len(inputs.query),
        scale=_GEOMETRY.scale,
        block_size=_PAGE,
        layer=0,
        num_layers=1,
        summaries=summaries,
    )

    def run(attend: Implementation) -> AttentionOutputs:
        chosen = method.select_prefill(view)
        listed = None if chosen is None else BlockLists(chosen.indices, chosen.counts)
        return attend(replace(asked, lists=listed))

    asked = inputs
    if method.skip_threshold(Phase.PREFILL, view.prompt_len) is None:
        asked = replace(inputs, log_thresholds=None, diagonal_first=None)

    choosing = _milliseconds(lambda: method.select_prefill(view), rep_ms)
    return _compare(run, cudnn, rep_ms) | {"choosing, ms": choosing}


def _compare(
    run: Callable[[Implementation], AttentionOutputs],
    cudnn: Run,
    rep_ms: int,
    peers: Mapping[str, Run] | None = None,
) -> dict[str, float]:
    """Each of our implementations, and peers, against dense attention by cuDNN."""
    ours = {name: partial(run, attend) for name, attend in implementations().items()}
    peers = peers or {}
    times = alternate_for({"cuDNN dense": cudnn, **peers, **ours}, rep_ms)
    result = {f"ratio: {p} over cuDNN dense": times["cuDNN dense"] / times[p] for p in peers}
    for name, attend in ours.items():
        total, chosen, skipped = attend().blocks.sum((0, 1)).tolist()
        result |= {f"ratio: {name} over cuDNN dense": times["cuDNN dense"] / times[name]}
        result |= {"density": (chosen - skipped) / total, "listed": chosen / total}
    return result | {f"{name}, ms": time for name, time in times.items()}


def variants(
    inputs: AttentionInputs, configs: list[PrefillConfig], rep_ms: int
) -> dict[str, float | str]:
    """Milliseconds of the kernel alone, as each configuration compiles it."""
    workspace, indices = Workspace.allocate(inputs), inputs.tiles.prefill_indices
    results: dict[str, float | str] = {}
    for config in configs:
        name = " ".join(f"{key}={int(value)}" for key, value in asdict(config).items())

        def run(config: PrefillConfig = config) -> None:
            prefill(inputs, indices, workspace, config)

        try:
            results[name] = _milliseconds(run, rep_ms)
        except (TritonError, RuntimeError) as error:  # too large, or beyond this compiler
            results[name] = f"{type(error).__name__}: {str(error)[:80]}"
    return results


def build(length: int) -> AttentionInputs:
    """One prompt of random rows on shuffled pages."""
    torch.manual_seed(0)
    num_pages = length // _PAGE
    tiles = [Tile(row, _PAGE, row, 0, is_decode=False) for row in range(0, length, _PAGE)]
    cache = num_pages, _PAGE, _GEOMETRY.num_kv_heads, _GEOMETRY.head_dim
    return AttentionInputs(
        query=_randn(length, _GEOMETRY.num_heads, _GEOMETRY.head_dim),
        keys=_randn(*cache),
        values=_randn(*cache),
        page_table=PageTable(torch.randperm(num_pages, device="cuda")[None]),
        tiles=QueryTiles(tuple(tiles), _PAGE, torch.device("cuda")),
        geometry=_GEOMETRY,
    )


def _randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def _random_lists(inputs: AttentionInputs, density: float) -> BlockLists:
    """Ascending lists per tile and KV head, the first and the diagonal block among them."""
    count = len(inputs.tiles.tiles)
    tile = torch.arange(count, device="cuda")[:, None, None]
    block = torch.arange(count, device="cuda")
    priority = torch.rand(count, _GEOMETRY.num_kv_heads, count, device="cuda")
    priority = priority.masked_fill((block == 0) | (block == tile), 2.0)
    priority = priority.masked_fill(block > tile, -1.0)
    rank = priority.argsort(-1, descending=True).argsort(-1)
    num_kept = ((tile + 1) * density).round().clamp(min=2)
    is_kept = (rank < num_kept) & (block <= tile)
    indices = torch.where(is_kept, block, count).sort(-1).values
    capacity = int(is_kept.sum(-1).max())
    return BlockLists(
        indices[..., :capacity].int().contiguous(), is_kept.sum(-1, dtype=torch.int32)
    )


def _clustered(
    inputs: AttentionInputs, share: float, *, of_groups: bool = False
) -> AttentionInputs:
    """Queries of a run of tokens follow one direction; runs of keys score high for some.

    The first run scores high for all, so what is low there lies 20 nats below the maximum. Query
    heads have directions of their own, or share that of their group: a list serves a group, so
    heads that look elsewhere make it longer.
    """
    length, num_clusters = len(inputs.query), _NUM_CLUSTERS
    directions = torch.linalg.qr(torch.randn(128, num_clusters, device="cuda")).Q.T
    runs = length // _CLUSTERED_KEYS
    num_different = _GEOMETRY.num_kv_heads if of_groups else _GEOMETRY.num_heads
    cluster = torch.randint(num_clusters, (runs, num_different), device="cuda")
    cluster = cluster.repeat_interleave(_GEOMETRY.num_heads // num_different, 1)
    hot = torch.rand(runs, _GEOMETRY.num_kv_heads, num_clusters, device="cuda") >= share
    hot[0] = True
    strength = math.sqrt(20 / _GEOMETRY.scale)
    query = (directions[cluster] * strength).repeat_interleave(_CLUSTERED_KEYS, 0)
    keys = (hot.float() @ directions * strength).repeat_interleave(_CLUSTERED_KEYS, 0)
    paged = torch.empty_like(inputs.keys)
    paged[inputs.page_table.pages[0]] = (
        (keys + 0.02 * torch.randn_like(keys)).view_as(paged).to(paged.dtype)
    )
    count = len(inputs.tiles.tiles)
    return replace(
        inputs,
        query=(query + 0.02 * torch.randn_like(query)).to(inputs.query.dtype),
        keys=paged,
        log_thresholds=torch.full((count,), math.log(_THRESHOLD), device="cuda"),
    )


def _cudnn(inputs: AttentionInputs) -> Run:
    pages, group = inputs.page_table.pages[0], _GEOMETRY.group_size
    query = inputs.query.transpose(0, 1)[None].contiguous()
    keys, values = (
        cache[pages].flatten(0, 1).transpose(0, 1).repeat_interleave(group, 0)[None].contiguous()
        for cache in (inputs.keys, inputs.values)
    )

    def run() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return functional.scaled_dot_product_attention(query, keys, values, is_causal=True)

    return run


def _flex_attention(inputs: AttentionInputs) -> dict[str, Run]:
    """The peer by its name, or nothing where it does not compile."""
    run = flex_attention.contender(inputs)
    try:
        run()
    except Exception as error:  # noqa: BLE001 - whatever a compiler says
        print(f"FlexAttention is left out: {type(error).__name__}: {str(error)[:200]}")
        return {}
    return {"FlexAttention": run}


def _flash_attn_4(inputs: AttentionInputs) -> Run:
    from flash_attn.cute import flash_attn_func

    pages = inputs.page_table.pages[0]
    query = inputs.query[None]
    keys, values = (cache[pages].flatten(0, 1)[None] for cache in (inputs.keys, inputs.values))
    return lambda: flash_attn_func(query, keys, values, causal=True)


def _milliseconds(run: Run, rep_ms: int) -> float:
    return alternate_for({"": run}, rep_ms)[""]


def _report(results: dict[str, Any], name: str, result: dict[str, Any]) -> None:
    results[name] = result
    print(f"\n{name}", flush=True)
    for key, value in result.items():
        print(f"  {value if isinstance(value, str) else format(value, '9.4g')}  {key}", flush=True)


if __name__ == "__main__":
    typer.run(main)
