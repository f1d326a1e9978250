"""The attention operation in Triton: one launch for prompt tiles and one for decode rows."""

from sparse_methods.kernels.operation import (
    AttentionInputs,
    AttentionOutputs,
    TileRun,
    count_selected,
)
from sparse_methods.kernels.triton_decode import decode
from sparse_methods.kernels.triton_prefill import prefill
from sparse_methods.kernels.triton_workspace import Workspace


def attend(inputs: AttentionInputs) -> AttentionOutputs:
    """Compute the operation; see ``operation`` for shapes and meaning.

    Nothing waits for the device, so a list without any visible block is not refused here: its
    rows come out as NaN.
    """
    workspace = Workspace.allocate(inputs)
    attend_beside(inputs, (), workspace)
    blocks, kv_elements = count_selected(inputs)
    if inputs.log_thresholds is not None:
        blocks[..., 2] += workspace.skipped
        unread = workspace.unread_keys.sum(1)
        kv_elements[:, 0].sub_(unread, alpha=inputs.geometry.value_dim)
    return AttentionOutputs(workspace.output, workspace.lse, blocks, kv_elements)


def attend_beside(inputs: AttentionInputs, runs: tuple[TileRun, ...], workspace: Workspace) -> None:
    """Compute every tile that is not of ``runs`` into ``workspace``."""
    prefill_indices = inputs.tiles.prefill_indices_beside(runs)
    if len(prefill_indices):
        prefill(inputs, prefill_indices, workspace)
    if len(inputs.tiles.decode_indices):
        decode(inputs, inputs.tiles.decode_indices, workspace)
