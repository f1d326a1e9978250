"""Compile the Gluon kernels for Hopper, on any machine; prints shared bytes per variant.

Run it in a process of its own: it tells Triton of a device that is not there, and the interpreter
of the other tests must be off.
"""

import itertools
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget

from sparse_methods.kernels import gluon_prefill, trial
from sparse_methods.kernels.operation import LayerGeometry
from sparse_methods.kernels.triton_workspace import Workspace


class HopperByName:
    """As much of a driver as compiling asks for."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, _device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


class Compiled:
    """A kernel that is compiled where it would be launched."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def compile_only(*args, **options):
            kernel = self.kernel.warmup(*args, grid=grid, **options)
            sys.stdout.write(f"{kernel.metadata.shared}\n")

        return compile_only


def main():
    triton.runtime.driver.set_active(HopperByName())
    vars(gluon_prefill)["clear_tails"] = lambda _: None  # a kernel that nobody compiles here
    for name in ("attend_tile", "attend_tile_with_threshold"):
        setattr(gluon_prefill, name, Compiled(getattr(gluon_prefill, name)))
    for head_dim, dtype, has_lists, has_thresholds in itertools.product(
        (64, 128), (torch.bfloat16, torch.float16), (False, True), (False, True)
    ):
        geometry = LayerGeometry(8, 2, head_dim, head_dim, scale=0.1)
        inputs = trial.zeros(geometry, dtype, torch.device("cpu"), num_rows=200, block_size=128)
        inputs = trial.with_lists(inputs) if has_lists else inputs
        inputs = trial.with_thresholds(inputs) if has_thresholds else inputs
        gluon_prefill.attend(inputs, inputs.tiles.prefill_indices, 4, Workspace.allocate(inputs))


if __name__ == "__main__":
    sys.exit(main())
