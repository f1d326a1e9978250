"""Attention of single decode rows in Triton: split-KV flash decoding over paged keys and values.

One program computes a *split*, a few of a row's blocks in visiting order, for all query heads of
one group, so that keys and values move once per group; a second kernel merges the splits of a row
in their order. How a row is cut depends on the row alone: a row of a batch equals the row alone,
bit for bit, unless thresholds of others send the batch through the kernels below.

With thresholds the running maximum runs through all splits. Then one kernel computes scores and
the maximum of each block, and another reads the values of the blocks that a head keeps; scores of
a group are small beside its keys, which are read once. Nothing waits for the device, and grids
depend only on the number of rows and their longest ``kv_len``: a CUDA graph can capture a call.

Source: flash decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html; thresholds as
    ``operation`` defines them.
Departures: how many splits a row has follows from its own blocks, so that no row depends on others.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton

from sparse_methods.kernels import triton_decode_kernels as kernels
from sparse_methods.kernels.operation import AttentionInputs
from sparse_methods.kernels.triton_launch import as_dependent
from sparse_methods.kernels.triton_workspace import Workspace

_LOG2_E = 1.4426950408889634
_FEW_SPLITS, _MANY_SPLITS = 4, 64  # whose maxima a program reads at once
_MERGED_SPLITS = 32  # splits that a merging program reads at once
_MERGED_CHANNELS = 128
_STEP_BYTES = 32768  # keys of one step: with the values and three stages half of shared memory


@dataclass(frozen=True)
class DecodeConfig:
    """How the work of a row is cut; it must not depend on the batch.

    Attributes:
        split_blocks: Most blocks of a split, a power of two that is at least four: with thresholds
            and heads of 64 or more, Triton 3.6 fails to compile a scan over fewer.
        least_splits: Splits that a row has at least, as long as it has the blocks: a short row in
            few long splits would leave the device idle.
        least_scored_splits: The same where thresholds apply: each split looks at all before it.
        step_keys: Most keys of one step of a program's loop, a power of two.
        num_warps: Warps of a program.
        num_stages: Steps whose loads are under way at once.
    """

    split_blocks: int
    least_splits: int
    least_scored_splits: int
    step_keys: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        if self.split_blocks < 4 or self.split_blocks & (self.split_blocks - 1):
            message = f"split_blocks must be 4, 8, 16 or another power of two: {self.split_blocks}"
            raise ValueError(message)


def default_config(inputs: AttentionInputs) -> DecodeConfig:
    """What was fastest on an H100 and an H200, of those that ``benchmarks/decode.py`` compares."""
    widest = triton.next_power_of_2(max(inputs.keys.shape[3], inputs.values.shape[3]))
    step_keys = _STEP_BYTES // (widest * inputs.keys.element_size())
    return DecodeConfig(
        split_blocks=8,
        least_splits=16,
        least_scored_splits=2,
        step_keys=min(64, step_keys),
        num_warps=4,
        num_stages=3,
    )


def most_splits(num_blocks: int, split_blocks: int, least_splits: int) -> int:
    """Splits of the row that has most, of rows of up to so many blocks; see ``DecodeConfig``."""
    # Splits of one block are most just before they get two; with longer ones there are fewer.
    return max(min(num_blocks, 2 * least_splits - 1), -(-num_blocks // split_blocks))


def decode(
    inputs: AttentionInputs,
    indices: torch.Tensor,
    workspace: Workspace,
    config: DecodeConfig | None = None,
) -> None:
    """Compute the rows of single-row tiles and what their thresholds skipped.

    Args:
        inputs: The whole batch.
        indices: [n] int32 on the device, places of the tiles in ``inputs.tiles``.
        workspace: Takes output and LSE of their rows, and their counters, which start at zero.
        config: How to cut the work; None takes the default.
    """
    if indices.shape[0]:
        _Decode(inputs, indices, workspace, config or default_config(inputs)).run()


class _Decode:
    """One call: the arguments its kernels share, and the memory between them."""

    def __init__(
        self,
        inputs: AttentionInputs,
        indices: torch.Tensor,
        workspace: Workspace,
        config: DecodeConfig,
    ) -> None:
        self.inputs, self.indices, self.workspace, self.config = inputs, indices, workspace, config
        geometry, block_size = inputs.geometry, inputs.tiles.block_size
        longest = max(tile.kv_len for tile in inputs.tiles.tiles if tile.num_rows == 1)
        most_blocks = triton.cdiv(longest, block_size)
        if inputs.lists is not None:
            most_blocks = max(most_blocks, inputs.lists.indices.shape[2])
        has_thresholds = inputs.log_thresholds is not None
        self.least_splits = config.least_scored_splits if has_thresholds else config.least_splits
        self.num_splits = most_splits(most_blocks, config.split_blocks, self.least_splits)
        self.step_keys = min(config.step_keys, max(16, triton.next_power_of_2(block_size)))
        shape = (indices.shape[0], geometry.num_heads, self.num_splits)
        self.scratch = inputs.query.new_empty(0, dtype=torch.float32)
        self.partials = (
            self.scratch.new_empty(*shape, geometry.value_dim),
            self.scratch.new_empty(shape),
            self.scratch.new_empty(shape),
        )
        self.grid = (geometry.num_kv_heads, self.num_splits, indices.shape[0])

    def run(self) -> None:
        """Launch two or three kernels."""
        if self.inputs.log_thresholds is None:
            kernels.attend_kernel[self.grid](**self._keys(), **self._values(), **self._walk())
        else:
            self._run_with_thresholds(self.inputs.log_thresholds)
        self._merge()

    def _run_with_thresholds(self, log_thresholds: torch.Tensor) -> None:
        num_heads, split_blocks = self.inputs.geometry.num_heads, self.config.split_blocks
        splits = (self.grid[2], num_heads, self.num_splits)
        steps = triton.cdiv(self.inputs.tiles.block_size, self.step_keys)
        between = {
            "all_scores": self.scratch.new_empty(*splits, split_blocks * steps * self.step_keys),
            "block_maxima": self.scratch.new_empty(*splits, split_blocks),
            "split_maxima": self.scratch.new_empty(splits),
        }
        kernels.score_kernel[self.grid](**self._keys(), **between, **self._walk())
        kernels.weigh_kernel[self.grid](
            **self._values(),
            **between,
            **self._walk(),
            log_thresholds=log_thresholds,
            skipped=self.workspace.skipped,
            unread_keys=self.workspace.unread_keys,
            WIDTH=_FEW_SPLITS if self.num_splits <= _FEW_SPLITS else _MANY_SPLITS,
        )

    def _merge(self) -> None:
        geometry = self.inputs.geometry
        channels = triton.cdiv(geometry.value_dim, _MERGED_CHANNELS)
        kernels.merge_kernel[(channels, geometry.num_heads, self.grid[2])](
            *self.partials,
            sinks=self.inputs.sinks,
            merged=self.workspace.output,
            lse=self.workspace.lse,
            **self._row(),
            VALUE_DIM=geometry.value_dim,
            CHANNELS=_MERGED_CHANNELS,
            WIDTH=_MERGED_SPLITS,
            num_warps=4,
        )

    def _keys(self) -> dict[str, Any]:
        geometry, query, keys = self.inputs.geometry, self.inputs.query, self.inputs.keys
        query = query if query.stride(2) == 1 else query.contiguous()
        softcap = geometry.softcap
        return {
            "query": query,
            "query_row_stride": query.stride(0),
            "query_head_stride": query.stride(1),
            "keys": keys,
            "key_page_stride": keys.stride(0),
            "key_slot_stride": keys.stride(1),
            "key_head_stride": keys.stride(2),
            "factor": geometry.scale / softcap if softcap else geometry.scale * _LOG2_E,
            "SOFTCAP": softcap * _LOG2_E,
            "HEAD_DIM": geometry.head_dim,
            "CHANNELS": max(16, triton.next_power_of_2(geometry.head_dim)),
        }

    def _values(self) -> dict[str, Any]:
        values, value_dim = self.inputs.values, self.inputs.geometry.value_dim
        outputs, maxima, sums = self.partials
        return {
            "values": values,
            "value_page_stride": values.stride(0),
            "value_slot_stride": values.stride(1),
            "value_head_stride": values.stride(2),
            "outputs": outputs,
            "maxima": maxima,
            "sums": sums,
            "VALUE_DIM": value_dim,
            "VALUE_CHANNELS": max(16, triton.next_power_of_2(value_dim)),
        }

    def _row(self) -> dict[str, Any]:
        """What says how many blocks a row visits."""
        geometry, lists = self.inputs.geometry, self.inputs.lists
        return {
            "indices": self.indices,
            "tiles": self.inputs.tiles.table,
            "counts": None if lists is None else lists.counts,
            "num_splits": self.num_splits,
            "BLOCK": self.inputs.tiles.block_size,
            "SPLIT": self.config.split_blocks,
            "LEAST_SPLITS": self.least_splits,
            "WINDOW": geometry.window,
            "CHUNK": geometry.chunk,
            "GROUP": geometry.group_size,
            **as_dependent(self.inputs.query.device),
        }

    def _walk(self) -> dict[str, Any]:
        """What says which blocks these are, and how a program walks through them."""
        inputs, pages = self.inputs, self.inputs.page_table.pages
        lists, diagonal_first = inputs.lists, inputs.diagonal_first
        return self._row() | {
            "pages": pages,
            "pages_stride": pages.stride(0),
            "lists": None if lists is None else lists.indices,
            "capacity": 0 if lists is None else lists.indices.shape[2],
            "diagonal_first": None if diagonal_first is None else diagonal_first.view(torch.uint8),
            "HEADS": max(16, triton.next_power_of_2(inputs.geometry.group_size)),
            "STEP": self.step_keys,
            "num_warps": self.config.num_warps,
            "num_stages": self.config.num_stages,
        }
