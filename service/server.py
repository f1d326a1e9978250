"""Running the application: readiness is announced, SIGTERM drains, and the exit status is true."""

import asyncio
import logging
import math
import resource
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI
from typing_extensions import override

from service.api.holder import EngineHolder
from service.connection import limited_connections
from service.settings import Settings

_log = logging.getLogger(__name__)
_OTHER_FILES = 512  # beside connections: weights, devices, the log, connections for probes
_FLUSH_S = 5  # for answers that are complete but not yet read


class Server(uvicorn.Server):
    """uvicorn, except that a signal first lets running requests finish.

    Until they have, the port stays open: probes are told 503 and balancers look elsewhere. A second
    signal ends the wait.

    Attributes:
        exit_code: 0 after a signal, 1 if the address could not be had, the model not be loaded, or
            the engine died, unless the operator wants a server with a dead engine to stay.
    """

    def __init__(self, settings: Settings, app: FastAPI, announce: Callable[[str], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                log_config=None,  # service/logs.py owns the log,
                access_log=False,  # and api/middleware.py its lines on requests
                server_header=False,
                timeout_graceful_shutdown=_FLUSH_S,
                http=limited_connections(settings, app.state.metrics.http_request),
                ws="none",
            )
        )
        self._max_connections = settings.max_connections
        self._holder: EngineHolder = app.state.holder
        self._announce: Callable[[str], None] | None = announce
        self._drain_timeout_s = settings.shutdown_timeout_s
        self._exits_on_death = settings.exit_on_engine_death
        self._is_dead = False
        self._drain_until = math.inf
        self.exit_code = 0

    @override
    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until the end; ``exit_code`` says how it ended, also if it could not begin."""
        try:
            super().run(sockets)
        except SystemExit:  # uvicorn's, which logged why: the address is taken, say
            self.exit_code = 1

    @override
    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until the end; every connection is an open file."""
        needed = self._max_connections + _OTHER_FILES
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < needed:
            wanted = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        await super().serve(sockets)

    @override
    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; on a second signal, stop at once."""
        # uvicorn's own handler raises the signal again at the end; the status would not be 0.
        if self._drain_until < math.inf:
            self._drain_until = 0.0
            return
        self._drain_until = time.monotonic() + self._drain_timeout_s
        self._holder.drain()

    @override
    async def on_tick(self, counter: int) -> bool:
        """Look after the engine ten times a second; True ends the server."""
        if self._drain_until < math.inf:
            if await self._is_drained():
                return True
        elif self._has_failed():
            self.exit_code = 1
            return True
        elif self._announce is not None and self._holder.is_loaded:
            self._announce(self._address())
            self._announce = None
        return await super().on_tick(counter)

    async def _is_drained(self) -> bool:
        # A request still being read or encoded is not the engine's yet, but has a task.
        if await self._holder.is_idle() and not self.server_state.tasks:
            return True
        if time.monotonic() < self._drain_until:
            return False
        _log.warning("requests still ran when the time to drain was over")
        await asyncio.to_thread(self._holder.stop)  # their clients are told
        return True

    def _has_failed(self) -> bool:
        if self._holder.failure is not None:
            return True
        self._holder.watch()
        status = self._holder.status()
        if status.loaded and not status.is_alive and not self._is_dead:
            self._is_dead = True
            _log.critical("not ready any more: %s", status.reason)
        return self._is_dead and self._exits_on_death

    def _address(self) -> str:
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
