"""The attention operation for prompt tiles on Hopper, of the common shapes.

``triton_prefill`` computes the same for every other device and shape, and where Gluon, which is
experimental, no longer compiles the kernels.
"""

import functools
import logging
from typing import Any

import torch
import triton
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sparse_methods.kernels import prompt_arguments, trial
from sparse_methods.kernels.gluon_prefill_kernels import attend_tile
from sparse_methods.kernels.gluon_skip_kernels import attend_tile_with_threshold
from sparse_methods.kernels.operation import AttentionInputs, LayerGeometry
from sparse_methods.kernels.physical_pages import clear_tails
from sparse_methods.kernels.triton_workspace import Workspace

_HEAD_DIMS = (64, 128)
_BLOCK = 128
_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
# Two groups of four warps, and one that loads; what 64 Ki registers allow them.
_ATTENDING = {"STAGES": 3, "REGISTERS": 240, "LOADING_REGISTERS": 24, "num_warps": 4}
# 16 rows per warp: scores of two blocks and the output then fit into registers.
_SKIPPING = {"STAGES": 4, "WARPS": 8, "num_warps": 8}

_log = logging.getLogger(__name__)


def serves(inputs: AttentionInputs) -> bool:
    """Whether the kernels compute tiles of this shape, here and with this Triton."""
    caches = inputs.keys, inputs.values
    return (
        _fits(inputs.geometry, inputs.query.dtype, inputs.tiles.block_size)
        and all(_is_described(cache, inputs.query.dtype) for cache in caches)
        and _compiles(
            inputs.geometry,
            inputs.query.dtype,
            inputs.query.device,
            inputs.lists is not None,
            inputs.log_thresholds is not None,
        )
    )


def prepare(
    geometry: LayerGeometry, dtype: torch.dtype, block_size: int, device: torch.device
) -> None:
    """Compile what a layer will need: seconds that no request should wait."""
    if _fits(geometry, dtype, block_size):
        for has_lists in (False, True):
            for has_thresholds in (False, True):
                _compiles(geometry, dtype, device, has_lists, has_thresholds)


def _fits(geometry: LayerGeometry, dtype: torch.dtype, block_size: int) -> bool:
    return (
        block_size == _BLOCK
        and geometry.is_plain
        and geometry.head_dim == geometry.value_dim
        and geometry.head_dim in _HEAD_DIMS
        and dtype in _DTYPES
    )


def _is_described(cache: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether the accelerator can address it in place."""
    return cache.is_contiguous() and cache.dtype == dtype and cache.data_ptr() % 16 == 0


@functools.cache
def _compiles(
    geometry: LayerGeometry,
    dtype: torch.dtype,
    device: torch.device,
    has_lists: bool,  # noqa: FBT001 - a key of the cache
    has_thresholds: bool,  # noqa: FBT001
) -> bool:
    """Whether a trial succeeds; what a compiler says otherwise goes to the log, once.

    What is no verdict on the kernel (short memory, a device that failed before) is raised.
    """
    # Not a full block, so that what clears its end is compiled, too.
    inputs = trial.zeros(geometry, dtype, device, num_rows=_BLOCK - 1, block_size=_BLOCK)
    inputs = trial.with_lists(inputs) if has_lists else inputs
    inputs = trial.with_thresholds(inputs) if has_thresholds else inputs
    _synchronize(device)
    try:
        attend(inputs, inputs.tiles.prefill_indices, 1, Workspace.allocate(inputs))
    except Exception as error:
        if "out of memory" in str(error):
            raise
        reason = _innermost(error)
        _log.warning(
            "Triton %s does not compile the Gluon kernel for %s (lists: %s, thresholds: %s);"
            " prompts take the slower one in Triton. %s: %s",
            triton.__version__,
            geometry,
            has_lists,
            has_thresholds,
            type(reason).__name__,
            str(reason)[-500:],
        )
        return False
    _synchronize(device)
    return True


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _innermost(error: BaseException) -> BaseException:
    """What a compiler's error was raised from; those around it quote the source."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return error


def attend(
    inputs: AttentionInputs,
    indices: torch.Tensor,
    heads_at_once: int,
    workspace: Workspace,
) -> None:
    """Compute the tiles named by ``indices`` into ``workspace``; see ``triton_prefill.prefill``.

    Args:
        inputs: What ``serves`` holds for.
        indices: [n] int32 tile indices, on the device, the longest tiles first.
        heads_at_once: Query heads whose programs run side by side.
        workspace: Receives output and lse of the tiles' rows, and skipped of the tiles.
    """
    clear_tails(inputs)  # what nobody wrote has a weight of 0, and 0 * inf is not 0
    geometry, query = inputs.geometry, inputs.query
    rows = (query, _descriptor(inputs.keys), _descriptor(inputs.values))
    results = (workspace.output, workspace.lse)
    places = prompt_arguments.places(inputs, indices)
    strides = (*query.stride()[:2], *prompt_arguments.steps(inputs, len(indices), heads_at_once))
    compiling: dict[str, Any] = {
        "NUM_HEADS": geometry.num_heads,
        "GROUP": geometry.group_size,
        "DIM": geometry.head_dim,
        "BLOCK": _BLOCK,
        "enable_fp_fusion": True,  # off by default from Triton 3.10 on
    }
    grid = (len(indices) * geometry.num_heads,)
    if inputs.log_thresholds is None:
        attend_tile[grid](*rows, *results, *places, *strides, **compiling, **_ATTENDING)
        return
    diagonal_first = inputs.diagonal_first
    if diagonal_first is None:  # with a constant, the compiler masks every block: a fifth slower
        diagonal_first = query.new_zeros(len(inputs.tiles.tiles), dtype=torch.bool)
    attend_tile_with_threshold[grid](
        *rows,
        *results,
        workspace.skipped,
        *places,
        inputs.log_thresholds,
        diagonal_first,
        *strides,
        **compiling,
        **_SKIPPING,
    )


def _descriptor(cache: torch.Tensor) -> TensorDescriptor:
    """[P * block_size, Hkv * D] view of a cache, read a block of one head at a time."""
    shape = [_BLOCK, cache.shape[3]]
    layout = gl.NVMMASharedLayout.get_default_for(shape, _DTYPES[cache.dtype])
    slots = cache.view(-1, cache.shape[2] * cache.shape[3])
    return TensorDescriptor.from_tensor(slots, shape, layout)
