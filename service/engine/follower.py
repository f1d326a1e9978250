"""A rank that is not the first: ``python -m service.engine.follower FD RANK``, run by rank 0."""

import logging
import os
import signal
import sys
from typing import cast

from service.engine.model_runner import ModelRunner
from service.engine.parallel import Welcome, follow, load_share, num_pages_of_all
from service.logs import configure_logging
from service.parallel.followers import Inbox
from service.parallel.group import RankGroup, find_meeting

logger = logging.getLogger(__name__)


def main(descriptor: int, rank: int) -> None:
    """Load a share of the model and follow rank 0 through the pipe until it says that it ends."""
    # A supervisor may ask every process to end; rank 0 answers what runs first, and needs this one.
    # Not ignored, or compilers that are started from here would ignore it, too.
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # see ``Followers``
    inbox = Inbox(descriptor)
    welcome = cast("Welcome", inbox.take())
    settings = welcome.settings
    configure_logging(settings.log_level)
    size = settings.tensor_parallel
    group = RankGroup.join(find_meeting(welcome.port, size), rank, size, welcome.kind)
    loaded = load_share(settings, group)
    geometries = [layer.geometry for layer in loaded.layers]
    runner = ModelRunner(
        loaded.model,
        [(layer.module, layer.geometry) for layer in loaded.layers],
        num_pages=num_pages_of_all(settings, geometries, loaded, group),
        block_size=settings.block_size,
        num_slots=settings.max_running_requests,
    )
    follow(runner, group, inbox)
    runner.forget_graphs()
    group.leave()


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]), int(sys.argv[2]))
        status = 0
    except BaseException:
        logger.exception("a tensor-parallel rank failed")
        status = 1
    sys.stderr.flush()
    os._exit(status)  # the others wait for this rank: nothing must keep its end from being seen
