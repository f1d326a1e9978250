"""The engine thread, and the only place where it meets asyncio.

Commands go down through an inbox; after each step all updates go up in one wake-up of the event
loop. An exception in a step fails those whom it concerns, is counted, and the thread lives on,
until the device answers no more or nothing but failures comes out.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from service.engine.core import EngineCore
from service.engine.events import FaultKind
from service.engine.faults import diagnose
from service.engine.outbox import Outbox
from service.engine.sequence import Sequence, Update
from service.errors import UnavailableError

_log = logging.getLogger(__name__)
_STOPPED = "The server was stopped before the generation ended."
MAX_FAILED_STEPS = 10  # in a row, before the engine is given up
_ENDING_S = 0.1  # for a thread that has been given up, and may hang
_BEAT_S = 0.5  # how often an idle engine shows that it is alive, unless that is too seldom
_LEAST_BEAT_S = 0.005  # or it would be busy with that


@dataclass(frozen=True)
class Address:
    """Where a sequence's updates go."""

    event_loop: asyncio.AbstractEventLoop
    outbox: Outbox
    index: int


class EngineLoop:
    """Runs an ``EngineCore`` in a thread of its own.

    Args:
        core: What it runs.
        stall_timeout_s: After how many seconds without a heartbeat it would count as stuck.

    Attributes:
        death: Why the engine cannot go on; empty as long as it can.
        heartbeat: When the thread last began a step, by the monotonic clock.
    """

    def __init__(self, core: EngineCore, stall_timeout_s: float) -> None:
        self._core = core
        self._beat_s = max(_LEAST_BEAT_S, min(_BEAT_S, stall_timeout_s / 4))
        self._num_failed_steps = 0  # in a row, and nobody's fault in particular
        self.death = ""
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._addresses: dict[Sequence, Address] = {}
        self._entering: dict[Sequence, int] = {}  # tokens of those in the inbox
        self._admission = threading.Lock()  # between a last submission and the end of the thread
        self._is_closed = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.heartbeat = time.monotonic()

    @property
    def is_alive(self) -> bool:
        """Whether the engine can still serve."""
        return self._thread.is_alive() and not self.death

    @property
    def is_busy(self) -> bool:
        """Whether the thread runs, if only to end."""
        return self._thread.is_alive()

    @property
    def num_unfinished(self) -> int:
        """Generations submitted that have not ended."""
        return len(self._addresses)

    @property
    def num_waiting_tokens(self) -> int:
        """Tokens to compute of the generations that wait, those in the inbox included."""
        return self._core.num_waiting_tokens + sum(list(self._entering.values()))

    def start(self) -> None:
        """Start the thread."""
        self.heartbeat = time.monotonic()  # what came before was loading
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Fail whatever runs and end the thread.

        A thread that is in the middle of a long step for ``timeout_s`` is left to itself; clients
        are told nonetheless.
        """
        self._stopping.set()
        self._inbox.put(lambda: None)
        if self._thread.is_alive():
            self._thread.join(_ENDING_S if self._is_closed else timeout_s)
        with self._admission:
            self._is_closed = True
        waiting = list(self._addresses)
        self._deliver({sequence: Update(error=UnavailableError(_STOPPED)) for sequence in waiting})

    def abandon(self, reason: str) -> None:
        """Give up a thread that hangs: tell every client, and let it end if it ever comes back."""
        with self._admission:
            self._is_closed = True
            self.death = reason
        error = UnavailableError(_dead(reason))
        self._deliver(dict.fromkeys(list(self._addresses), Update(error=error)))

    def add(self, sequence: Sequence, address: Address) -> None:
        """Hand a sequence to the engine; its updates go to ``address``.

        Raises:
            UnavailableError: The thread has ended.
        """
        with self._admission:
            if self._is_closed:
                raise UnavailableError("The engine has stopped.")
            self._addresses[sequence] = address
            self._entering[sequence] = sequence.num_tokens
            self._inbox.put(lambda: self._take_in(sequence))

    def abort(self, sequence: Sequence, reason: str) -> None:
        """End a sequence early and free its pages; one that has ended is left alone."""

        def command() -> None:
            if self._addresses.pop(sequence, None) is not None:
                self._guard(sequence, lambda: self._core.abort(sequence, reason))

        self._inbox.put(command)

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence early and tell its reader; one that has ended is left alone."""

        def command() -> None:
            self._deliver(self._core.cancel(sequence))

        self._inbox.put(lambda: self._guard(sequence, command))

    def _take_in(self, sequence: Sequence) -> None:
        self._guard(sequence, lambda: self._core.add(sequence))
        del self._entering[sequence]  # last, so that admission always counts it

    def _guard(self, sequence: Sequence, command: Callable[[], None]) -> None:
        """Run a command about one sequence; if it fails, only that sequence does."""
        try:
            command()
        except Exception as error:  # noqa: BLE001 - one request must not end the engine
            self._deliver({sequence: self._core.fail(sequence, error)})

    def _run(self) -> None:
        try:
            while not (self._stopping.is_set() or self.death):
                self._take_commands()
                self.heartbeat = time.monotonic()
                if self._core.has_work:
                    self._deliver(self._step())
        except BaseException as error:  # noqa: BLE001 - whatever it is, clients must be told
            _log.critical("the engine thread ends", exc_info=error)
            self.death = "its thread failed"
        finally:
            self._close()

    def _take_commands(self) -> None:
        is_idle = not self._core.has_work
        try:
            command = self._inbox.get(timeout=self._beat_s if is_idle else 0)
            while True:
                command()
                command = self._inbox.get_nowait()
        except queue.Empty:
            return

    def _close(self) -> None:
        """Nobody may wait for an engine that has ended."""
        with self._admission:
            self._is_closed = True
        failure = UnavailableError(_dead(self.death) if self.death else _STOPPED)
        updates: dict[Sequence, Update] = {}
        try:
            updates = self._core.fail_all(failure, "death" if self.death else "shutdown")
        except Exception as error:  # noqa: BLE001 - whatever is broken, clients are told
            _log.error("the engine did not end cleanly", exc_info=error)
        unheard = dict.fromkeys(list(self._addresses), Update(error=failure))
        self._deliver(unheard | updates)

    def _step(self) -> dict[Sequence, Update]:
        try:
            updates = self._core.step()
        except Exception as error:  # noqa: BLE001 - the one frame that keeps the engine alive
            _log.error("engine step failed", exc_info=error)
            return self._recover(error)
        self._num_failed_steps = 0
        return updates

    def _recover(self, error: Exception) -> dict[Sequence, Update]:
        """Fail whom the failed step concerns, and decide whether there can be another one."""
        updates = self._core.fail_step(error)
        if diagnose(error)[0] is FaultKind.STEP:
            self._num_failed_steps += 1
        if not self._core.device_answers:
            self.death = "the device answers no more"
        elif self._num_failed_steps >= MAX_FAILED_STEPS:
            self.death = f"{self._num_failed_steps} steps in a row failed"
        if self.death:
            _log.critical("the engine cannot go on: %s", self.death)
        return updates

    def _deliver(self, updates: dict[Sequence, Update]) -> None:
        """Send updates up: one wake-up per event loop, however many sequences moved."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Address, Update]]] = {}
        for sequence, update in updates.items():
            address = self._addresses.get(sequence)
            if address is None:
                continue
            by_loop.setdefault(address.event_loop, []).append((address, update))
            if update.is_last:
                self._addresses.pop(sequence, None)
        for event_loop, items in by_loop.items():
            try:
                event_loop.call_soon_threadsafe(_put_all, items)
            except RuntimeError:  # the event loop is closed: nobody reads any more
                for address, _ in items:
                    self._forget(address)

    def _forget(self, address: Address) -> None:
        for sequence in [s for s, a in list(self._addresses.items()) if a is address]:
            self.abort(sequence, "client")  # by the engine's own thread, whichever this is


def _dead(reason: str) -> str:
    return f"The engine cannot go on: {reason}."


def _put_all(items: list[tuple[Address, Update]]) -> None:
    for address, update in items:
        address.outbox.put(address.index, update)
