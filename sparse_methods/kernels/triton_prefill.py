"""The attention operation in Triton, for query tiles of several rows.

One program computes one tile of one query head. The heads of a group lie side by side in the
grid, so that they share keys and values in the L2 cache, and the tiles with the most keys start
first. Nothing is accumulated across programs, so a tile's result does not depend on its batch,
unless thresholds of others send the batch through another kernel. ``gluon_prefill`` computes the
common shapes on Hopper.
"""

import functools
import logging
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from sparse_methods.kernels import prompt_arguments
from sparse_methods.kernels.operation import AttentionInputs, LayerGeometry
from sparse_methods.kernels.triton_launch import HOPPER, cuda_major
from sparse_methods.kernels.triton_prefill_kernels import attend_tile
from sparse_methods.kernels.triton_skip_kernels import attend_tile_with_threshold
from sparse_methods.kernels.triton_workspace import Workspace

_log = logging.getLogger(__name__)

_L2_BYTES = 32 << 20  # what of an H100's 50 MiB keys and values may fill
_SHARED_BYTES = 227 << 10  # what a block may use on an H100


@dataclass(frozen=True)
class PrefillConfig:
    """How a kernel is compiled. Results do not depend on it beyond the rounding of sums.

    Attributes:
        num_warps: Warps of a program.
        num_stages: Depth of the software pipeline of loads.
        sub_tile: Keys of one step of the softmax, at most a block; with thresholds, it is a block.
        use_tma: Load keys and values by the tensor memory accelerator. Slots of the cache that
            nobody wrote must then be finite, as nothing hides them from the product with V.
        split_loops: Run blocks that need no mask in a loop of their own.
        in_pairs: With thresholds, take two blocks in a step, for one decision on both.
        warp_specialize: Let Triton give loads, products and softmax to different warps.
    """

    num_warps: int = 8
    num_stages: int = 2
    sub_tile: int = 128
    use_tma: bool = False
    split_loops: bool = True
    in_pairs: bool = False
    warp_specialize: bool = False


def default_config(inputs: AttentionInputs) -> PrefillConfig:
    """The configuration for the shape at hand: a table, so that results never vary by run."""
    geometry, block_size = inputs.geometry, inputs.tiles.block_size
    width = max(_padded(geometry.head_dim), _padded(geometry.value_dim))
    # A warp per 16 rows: the accumulators of the scores and of the output then stay in registers.
    num_warps = max(4, min(16, block_size // 16))
    sub_tile = min(block_size, 128 if max(width, block_size) <= 128 else 64)
    if inputs.log_thresholds is not None:  # one decision takes the scores of the whole block
        sub_tile = block_size
    row_bytes = width * inputs.query.element_size()
    num_stages = 3 if width <= 128 else 2  # three were measured to be a tenth faster than two
    while num_stages > 1 and (block_size + 2 * num_stages * sub_tile) * row_bytes > _SHARED_BYTES:
        num_stages -= 1
    return PrefillConfig(num_warps=num_warps, num_stages=num_stages, sub_tile=sub_tile)


def prepare(
    geometry: LayerGeometry, dtype: torch.dtype, block_size: int, device: torch.device
) -> None:
    """Compile what takes seconds, so that no request waits for it."""
    gluon = _gluon(device)
    if gluon is not None:
        gluon.prepare(geometry, dtype, block_size, device)


def prefill(
    inputs: AttentionInputs,
    indices: torch.Tensor,
    workspace: Workspace,
    config: PrefillConfig | None = None,
) -> None:
    """Compute the tiles named by ``indices`` into ``workspace``.

    Args:
        inputs: All tiles of the step. A list must name at least one block that its tile sees.
        indices: [n] int32 tile indices, on the device, the longest tiles first.
        workspace: Receives output and lse of the tiles' rows, and skipped of the tiles.
        config: How to compile; the default fits the shape.

    """
    geometry, tiles = inputs.geometry, inputs.tiles
    heads_at_once = _kv_heads_in_l2(inputs) * geometry.group_size
    gluon = _gluon(inputs.query.device) if config is None else None
    if gluon is not None and gluon.serves(inputs):
        gluon.attend(inputs, indices, heads_at_once, workspace)
        return
    config = config or default_config(inputs)
    query, keys, values, lists = inputs.query, inputs.keys, inputs.values, inputs.lists
    has_thresholds = inputs.log_thresholds is not None
    keys_at_once = tiles.block_size if has_thresholds else config.sub_tile
    shapes: dict[str, Any] = {
        "NUM_HEADS": geometry.num_heads,
        "GROUP": geometry.group_size,
        "HEAD_DIM": geometry.head_dim,
        "VALUE_DIM": geometry.value_dim,
        "PADDED_HEAD_DIM": _padded(geometry.head_dim),
        "PADDED_VALUE_DIM": _padded(geometry.value_dim),
        "BLOCK": tiles.block_size,
        "WINDOW": geometry.window,
        "CHUNK": geometry.chunk,
        "SOFTCAP": geometry.softcap,
        "USE_TMA": config.use_tma,
        "STAGES": config.num_stages,
    }
    places = prompt_arguments.places(inputs, indices)
    strides = (
        *query.stride()[:2],
        *keys.stride()[:3],
        *values.stride()[:3],
        *prompt_arguments.steps(inputs, len(indices), heads_at_once),
    )
    caches = (
        _descriptor(cache, keys_at_once) if config.use_tma else cache for cache in (keys, values)
    )
    compiling = {
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": True,  # off by default from Triton 3.10 on
    }
    grid = (len(indices) * geometry.num_heads,)
    if has_thresholds:
        attend_tile_with_threshold[grid](
            query,
            *caches,
            workspace.output,
            workspace.lse,
            workspace.skipped,
            *places,
            inputs.log_thresholds,
            inputs.diagonal_first,
            inputs.sinks,
            *strides,
            **shapes,
            IN_PAIRS=config.in_pairs,
            **compiling,
        )
        return
    is_split = config.split_loops and lists is None
    has_window = bool(geometry.window or geometry.chunk)
    attend_tile[grid](
        query,
        *caches,
        workspace.output,
        workspace.lse,
        *places,
        inputs.sinks,
        *strides,
        **shapes,
        SUB_TILE=config.sub_tile,
        # Blocks at the window's edge, blocks without a mask, and the others; or all as the last.
        FIRST_PHASE=(0 if has_window else 1) if is_split else 2,
        WARP_SPECIALIZE=config.warp_specialize,
        **compiling,
    )


@functools.cache
def _gluon(device: torch.device) -> ModuleType | None:
    """The kernels in Gluon where they run: on Hopper, while Triton has what they import."""
    if cuda_major(device) != HOPPER:
        return None
    try:
        from sparse_methods.kernels import gluon_prefill
    except Exception as error:  # noqa: BLE001 - its decorators, too, may refuse
        _log.warning(
            "Triton %s does not import the Gluon kernels; prompts take the slower ones in Triton."
            " %s: %s",
            triton.__version__,
            type(error).__name__,
            error,
        )
        return None
    return gluon_prefill


def _padded(dim: int) -> int:
    return max(16, int(triton.next_power_of_2(dim)))


def _kv_heads_in_l2(inputs: AttentionInputs) -> int:
    """KV heads to run side by side: as many as the L2 cache holds of the longest request."""
    geometry = inputs.geometry
    per_key = (geometry.head_dim + geometry.value_dim) * inputs.keys.element_size()
    fitting = max(1, _L2_BYTES // (per_key * inputs.tiles.max_kv_len))
    divisors = (n for n in range(geometry.num_kv_heads, 0, -1) if geometry.num_kv_heads % n == 0)
    return next(n for n in divisors if n <= fitting)


def _descriptor(cache: torch.Tensor, num_keys: int) -> TensorDescriptor:
    """[P * block_size, Hkv * D] view of a cache, read ``num_keys`` rows of one head at a time."""
    slots = cache.flatten(2).flatten(0, 1)
    return TensorDescriptor.from_tensor(slots, [num_keys, cache.shape[3]])
