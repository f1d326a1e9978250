"""Where the engine will be: the server answers probes while the model is still loading."""

import gc
import logging
import threading
from collections.abc import Callable

from service.engine.engine import Engine
from service.engine.events import EngineEvents
from service.engine.status import EngineStatus
from service.errors import UnavailableError

LoadEngine = Callable[[EngineEvents], Engine]

_log = logging.getLogger(__name__)
_NOT_LOADED = EngineStatus(
    loaded=False,
    is_alive=False,
    is_draining=False,
    is_stalled=False,
    reason="the model is loading",
    num_running=0,
    num_waiting=0,
    num_pages_total=0,
    num_pages_used=0,
)


class EngineHolder:
    """An engine that loads in a thread of its own.

    Attributes:
        failure: Why loading failed; None as long as it has not.
    """

    def __init__(self, load: LoadEngine) -> None:
        self._load = load
        self._engine: Engine | None = None
        self._is_draining = False
        self._thread: threading.Thread | None = None
        self._is_stopped = False
        self.failure: BaseException | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a thread still loads or computes, so that the interpreter cannot end cleanly."""
        is_loading = self._thread is not None and self._thread.is_alive()
        return is_loading or (self._engine is not None and self._engine.is_busy)

    @property
    def engine(self) -> Engine:
        """The engine.

        Raises:
            UnavailableError: It has not been loaded (yet).
        """
        if self._engine is None:
            reason = self.status().reason or "the model is loading"  # it may be there by now
            raise UnavailableError(f"The server is not ready: {reason}.")
        return self._engine

    @property
    def is_loaded(self) -> bool:
        """Whether there is an engine."""
        return self._engine is not None

    def start(self, events: EngineEvents) -> None:
        """Begin to load; a failure is kept in ``failure``."""
        self._thread = threading.Thread(
            target=self._run, args=(events,), name="loading", daemon=True
        )
        self._thread.start()

    def watch(self) -> None:
        """Give the engine up if it hangs."""
        if self._engine is not None:
            self._engine.watch()

    def drain(self) -> None:
        """Refuse new work from now on."""
        self._is_draining = True
        if self._engine is not None:
            self._engine.drain()

    def stop(self) -> None:
        """Abort whatever runs and end the engine thread; if it still loads, as soon as it has."""
        self._is_stopped = True
        self.drain()
        if self._engine is not None:
            self._engine.stop()

    async def is_idle(self) -> bool:
        """Whether no generation runs or waits."""
        return self._engine is None or await self._engine.wait_idle(0.0)

    def status(self) -> EngineStatus:
        """State of the engine; a status that is not loaded while there is none."""
        engine = self._engine  # once: the thread that loads may set it at any moment
        if engine is not None:
            return engine.status()
        if self.failure is None:
            return _NOT_LOADED
        return EngineStatus(**{**vars(_NOT_LOADED), "reason": "the model could not be loaded"})

    def _run(self, events: EngineEvents) -> None:
        try:
            engine = self._load(events)
            gc.collect()
            gc.freeze()  # model and tokenizer stay: no later collection need look at them again
            engine.start()
        except BaseException as error:  # noqa: BLE001 - a thread has nobody to raise to
            _log.exception("the model could not be loaded")
            self.failure = error
            return
        self._engine = engine
        if self._is_draining:  # told to stop while loading
            engine.drain()
        if self._is_stopped:
            engine.stop()
