"""A rank of ``benchmarks.tensor_parallel`` that is not the first, run by it."""

import os
import sys
import traceback
from typing import cast

from benchmarks.tensor_parallel import build, cache
from service.engine.model_runner import ModelRunner
from service.engine.parallel import follow
from service.parallel.followers import Inbox
from service.parallel.group import RankGroup, find_meeting


def main(descriptor: int, rank: int) -> None:
    """Follow rank 0 until it says that it ends."""
    inbox = Inbox(descriptor)
    size, kind, num_layers, port = cast("tuple[int, str, int, int]", inbox.take())
    group = RankGroup.join(find_meeting(port, size), rank, size, kind)
    loaded = build(kind, num_layers, group)
    modules = [(layer.module, layer.geometry) for layer in loaded.layers]
    runner = ModelRunner(loaded.model, modules, **cache(kind))
    follow(runner, group, inbox)
    runner.forget_graphs()
    group.leave()


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]), int(sys.argv[2]))
        os._exit(0)
    except Exception:  # noqa: BLE001 - rank 0 must see it at once
        traceback.print_exc()
        os._exit(1)
