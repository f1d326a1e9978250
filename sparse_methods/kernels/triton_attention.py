"""The attention operation in Triton: one launch for prompt tiles and one for decode rows."""

from sparse_methods.kernels.operation import AttentionInputs, AttentionOutputs, TileRun
from sparse_methods.kernels.triton_counts import count
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
    blocks, kv_elements = count(inputs, workspace)
    return AttentionOutputs(workspace.output, workspace.lse, blocks, kv_elements)


def attend_beside(inputs: AttentionInputs, runs: tuple[TileRun, ...], workspace: Workspace) -> None:
    """Compute every tile that is not of ``runs`` into ``workspace``."""
    prefill_indices = inputs.tiles.prefill_indices_beside(runs)
    if len(prefill_indices):
        prefill(inputs, prefill_indices, workspace)
    if len(inputs.tiles.decode_indices):
        decode(inputs, inputs.tiles.decode_indices, workspace)
