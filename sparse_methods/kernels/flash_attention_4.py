"""The attention operation with the library flash-attn-4, for long prompts on Hopper and newer.

Runs of prompt tiles that the library can compute go to it: dense ones by its page table, listed
ones by block lists that name physical pages, as the whole cache looks to it like one sequence of
keys. Everything else (decode rows, thresholds, windows, short or oddly cut prompts, other block
sizes) is computed by our own kernels.

Source: Dao-AILab, FlashAttention-4, package ``flash-attn-4``.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from cutlass import cute
from flash_attn.cute import flash_attn_func, flash_attn_varlen_func
from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

from sparse_methods.kernels import trial, triton_attention
from sparse_methods.kernels.operation import (
    AttentionInputs,
    AttentionOutputs,
    LayerGeometry,
    TileRun,
    count_selected,
)
from sparse_methods.kernels.physical_pages import clear_tails, physical_lists
from sparse_methods.kernels.triton_counts import count
from sparse_methods.kernels.triton_workspace import Workspace

_BLOCK = 128  # keys of a tile of the library, which must be a page
_HEAD_DIMS = (64, 96, 128)  # with which its tiles of keys are that long
# Many shorter runs share one launch of our own kernels instead.
_LEAST_ROWS = 512
# Rows times keys below which a call costs the host more than the faster kernel gains.
_LEAST_SCORES = 2048 * 2048


@cute.jit  # type: ignore[untyped-decorator]
def _own_block_mask(_batch: Any, _head: Any, row: Any, key: Any, _seqlen: Any, _aux: Any) -> Any:
    """Causality within the block that a tile lies in: both begin at multiples of its size."""
    return key % _BLOCK <= row % _BLOCK


def attend(inputs: AttentionInputs) -> AttentionOutputs:
    """Compute the operation; see ``operation`` for shapes and meaning."""
    runs = _runs(inputs)
    if not runs:
        return triton_attention.attend(inputs)
    clear_tails(inputs)
    blocks, kv_elements = _count(inputs, runs)
    if runs[0].num_rows == len(inputs.query):
        output, lse = _attend_run(inputs, runs[0], blocks)
        return AttentionOutputs(output, lse, blocks, kv_elements)
    workspace = Workspace.allocate(inputs)
    triton_attention.attend_beside(inputs, runs, workspace)
    for run in runs:
        workspace.output[run.rows], workspace.lse[run.rows] = _attend_run(inputs, run, blocks)
    return AttentionOutputs(workspace.output, workspace.lse, blocks, kv_elements)


def prepare(
    geometry: LayerGeometry, dtype: torch.dtype, block_size: int, device: torch.device
) -> None:
    """Compile what ``attend`` will call for a layer: seconds that no request should wait."""
    num_rows = max(_LEAST_ROWS, math.isqrt(_LEAST_SCORES))
    inputs = trial.zeros(geometry, dtype, device, num_rows, block_size)
    if _runs(inputs):
        attend(inputs)
        attend(trial.with_lists(inputs))


def _runs(inputs: AttentionInputs) -> tuple[TileRun, ...]:
    """The runs of tiles that the library computes."""
    geometry = inputs.geometry
    fits = (
        geometry.is_plain
        and geometry.head_dim == geometry.value_dim
        and geometry.head_dim in _HEAD_DIMS
        and inputs.tiles.block_size == _BLOCK
        and inputs.query.dtype in (torch.bfloat16, torch.float16)
        and inputs.log_thresholds is None
    )
    if not fits:
        return ()
    return tuple(
        run
        for run in inputs.tiles.runs
        if run.num_rows >= _LEAST_ROWS and run.num_rows * run.kv_len >= _LEAST_SCORES
    )


def _count(inputs: AttentionInputs, runs: tuple[TileRun, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """``count_selected``; of listed runs, what was selected is still to be filled in."""
    num_listed = sum(run.num_tiles for run in runs)
    if inputs.lists is None or num_listed < len(inputs.tiles.tiles):
        return count(inputs)
    blocks, kv_elements = count_selected(replace(inputs, lists=None))
    return blocks.clone(), kv_elements


def _attend_run(
    inputs: AttentionInputs, run: TileRun, blocks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, Hq, D] and [T, Hq] of the rows of a run."""
    query, scale = inputs.query[run.rows][None], inputs.geometry.scale
    if inputs.lists is None:
        output, lse = flash_attn_varlen_func(
            query,
            inputs.keys,
            inputs.values,
            page_table=inputs.page_table.compact[run.request][None],
            seqused_k=_kv_len(inputs, run),
            softmax_scale=scale,
            causal=True,
            return_lse=True,
        )
        return output[0], lse[0].T
    lists = physical_lists(inputs, run, blocks)
    output, lse = flash_attn_func(
        query,
        *(cache.flatten(0, 1)[None] for cache in (inputs.keys, inputs.values)),
        softmax_scale=scale,
        pack_gqa=False,
        mask_mod=_own_block_mask,
        block_sparse_tensors=BlockSparseTensorsTorch(
            mask_block_cnt=lists.own_counts,
            mask_block_idx=lists.own_pages,
            full_block_cnt=lists.counts,
            full_block_idx=lists.pages,
            block_size=(_BLOCK, _BLOCK),
        ),
        return_lse=True,
    )
    return output[0], lse[0].T


def _kv_len(inputs: AttentionInputs, run: TileRun) -> torch.Tensor:
    """[1] int32, on the device."""
    last = run.tiles.stop - 1
    return inputs.tiles.kv_lens[last : last + 1].to(torch.int32)
