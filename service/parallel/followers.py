"""The other ranks as rank 0 sees them: processes of this machine, each at the end of a pipe.

A pipe tells both sides at once when the other one has died, which no timeout does. Messages are
pickled: both ends are our own, and the pipe has no name by which anybody else could open it.
"""

import faulthandler
import logging
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from service.errors import UnavailableError

ANSWER_TIMEOUT_S = 120.0
_END_GRACE_S = 20.0  # for clients to be told, once a rank is lost; then the process ends anyway
_STOP_TIMEOUT_S = 10.0
_STDERR = 2

logger = logging.getLogger(__name__)


class Followers:
    """Ranks 1 to size - 1.

    When one of them ends, or rank 0 fails in the middle of a step, the ranks no longer agree and
    nothing can be computed any more: ``failure`` says so, and the process ends, at the latest after
    a grace in which clients are told.

    Args:
        module: Run as ``python -m module FD RANK``; FD is its end of the pipe.
        size: Number of ranks, this one included.

    Attributes:
        failure: Why nothing is computed any more; empty as long as all is well.
    """

    def __init__(self, module: str, size: int) -> None:
        self.failure = ""
        self._failing = threading.Lock()
        self._is_stopping = False
        self._tell: Callable[[str], None] | None = None
        self._processes: list[subprocess.Popen[bytes]] = []
        self._pipes: list[Connection] = []
        for rank in range(1, size):
            ours, theirs = Pipe()
            self._pipes.append(ours)
            self._processes.append(_start(module, theirs, rank))
            theirs.close()
        for rank, process in enumerate(self._processes, start=1):
            threading.Thread(
                target=self._watch, args=(rank, process), name=f"rank {rank}", daemon=True
            ).start()

    @property
    def pids(self) -> list[int]:
        """Process ids, by rank from 1 on."""
        return [process.pid for process in self._processes]

    def on_failure(self, tell: Callable[[str], None]) -> None:
        """Call this with the reason when nothing can be computed any more, from any thread."""
        self._tell = tell

    def tell(self, message: object) -> None:
        """Send all of them a message; they take messages in order.

        Raises:
            UnavailableError: A rank is lost.
        """
        if self.failure:
            raise UnavailableError(self.failure)
        content = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        try:
            for pipe in self._pipes:
                pipe.send_bytes(content)
        except OSError as error:
            self.fail(f"a tensor-parallel rank cannot be reached ({error})")
            raise UnavailableError(self.failure) from error

    def ask(self, message: object) -> list[object]:
        """Send all of them a message; return what each answers, by rank.

        Raises:
            UnavailableError: A rank is lost, or does not answer.
        """
        self.tell(message)
        answers = []
        try:
            for rank, pipe in enumerate(self._pipes, start=1):
                if not pipe.poll(ANSWER_TIMEOUT_S):
                    raise TimeoutError(f"rank {rank} does not answer")
                answers.append(pipe.recv())
        except (OSError, EOFError) as error:
            self.fail(f"a tensor-parallel rank cannot be heard ({error})")
            raise UnavailableError(self.failure) from error
        return answers

    def fail(self, reason: str) -> None:
        """Say that nothing can be computed any more; the process ends soon."""
        with self._failing:  # a rank's thread and whoever waits for the rank often see it together
            if self.failure or self._is_stopping:
                return
            # No thread of ours may be needed for it: they may all wait for the device, which waits
            # for the rank that is lost. Whoever reads of the failure can rely on the end.
            faulthandler.dump_traceback_later(_END_GRACE_S, exit=True, file=_STDERR)
            self.failure = reason
        logger.error("%s; the service ends", reason)
        if self._tell is not None:
            self._tell(reason)

    def dismiss(self) -> None:
        """Ask all of them to end."""
        self._is_stopping = True
        for pipe in self._pipes:
            try:
                pipe.send(None)
            except OSError:  # it has ended already
                continue

    def stop(self) -> None:
        """End all of them; those that do not end by themselves are killed."""
        if not self._is_stopping:
            self.dismiss()
        for process in self._processes:
            try:
                process.wait(0.0 if self.failure else _STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for pipe in self._pipes:
            pipe.close()

    def _watch(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        status = process.wait()
        self.fail(f"tensor-parallel rank {rank} ended with status {status}")


def _start(module: str, pipe: Connection, rank: int) -> subprocess.Popen[bytes]:
    """Run a follower that imports what this process imports, and is ended by it alone."""
    descriptor = pipe.fileno()
    # SIGTERM waits until the follower, whose imports take seconds, says what it makes of it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        return subprocess.Popen(  # noqa: S603 - our own module in our own interpreter
            [sys.executable, "-m", module, str(descriptor), str(rank)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            pass_fds=[descriptor],
            stdin=subprocess.DEVNULL,
            stdout=_STDERR,  # standard output is this process's own
            start_new_session=True,  # an interrupt at the terminal lets requests finish first
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Inbox:
    """Messages of rank 0 on their way to this rank.

    When rank 0 has died this process ends at once, whatever it waits for.
    """

    def __init__(self, descriptor: int) -> None:
        self._pipe = Connection(descriptor)
        self._messages: queue.SimpleQueue[object] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="inbox", daemon=True).start()

    def take(self) -> object:
        """Wait for the next message; None is the last one."""
        return self._messages.get()

    def answer(self, message: object) -> None:
        """Answer the message taken last."""
        self._pipe.send(message)

    def _read(self) -> None:
        try:
            while True:
                message = self._pipe.recv()
                self._messages.put(message)
                if message is None:
                    return
        except (EOFError, OSError):
            logger.error("rank 0 has ended; this rank ends, too")  # noqa: TRY400 - no bug of ours
            os._exit(1)
        except BaseException:
            logger.exception("a message of rank 0 cannot be read; this rank ends")
            os._exit(1)
