"""An engine that says words: the HTTP layer is tested against it, without a model.

Run as a module it serves over HTTP: ``python -m tests.service.fake_engine STEP_S SHUTDOWN_S``.
"""

import asyncio
import logging
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI

import service
from service.engine.events import EngineEvents, NoEvents
from service.engine.generation import GenerationRequest
from service.engine.sequence import Finish, FinishReason, Sequence, Timing, TokenLogprob, Update
from service.engine.status import EngineStatus
from service.engine.tokenizer import Tokenizer
from service.errors import PromptTooLongError, ServiceError, UnavailableError
from service.main import create_app
from service.models.self_test import SelfTestReport
from service.server import Server
from service.settings import Settings
from sparse_methods import Phase, SparseAttentionMethod
from sparse_methods.statistics import LayerStatistics, PhaseStatistics, RequestStatistics

WORDS = ("Once", " upon", " a", " time")


def statistics() -> RequestStatistics:
    """Two layers of two heads, every count different."""
    head = {
        Phase.PREFILL: PhaseStatistics(10, 8, 3),
        Phase.DECODE: PhaseStatistics(4, 2, 1),
    }
    sums = {
        Phase.PREFILL: PhaseStatistics(20, 16, 6),
        Phase.DECODE: PhaseStatistics(8, 4, 2, 100, 400),
    }
    return RequestStatistics(tuple(LayerStatistics(i, sums, (head, head)) for i in range(2)))


def finish(reason: FinishReason = FinishReason.STOP, num_generated: int = len(WORDS)) -> Finish:
    timing = Timing(
        queue_s=0.1, prefill_s=0.2, time_to_first_token_s=0.3, decode_s=0.4, total_s=0.7
    )
    return Finish(reason, None, statistics(), timing, 5, 2, num_generated)


class FakeGeneration:
    def __init__(self, engine: "FakeEngine", request: GenerationRequest) -> None:
        self._engine, self._request = engine, request
        self.prompt_ids = request.prompt_ids or list((request.prompt or "").encode())
        self._is_done = self._is_cancelled = self._is_read = False

    def cancel(self) -> None:
        self._is_cancelled = True

    async def __aenter__(self) -> "FakeGeneration":
        self._engine.num_running += 1
        return self

    async def __aexit__(self, *_: object) -> None:
        self._engine.num_running -= 1
        if not self._is_done:
            self._engine.num_aborted += 1
            self._engine.events.aborted("client")

    async def has_begun(self) -> None:
        assert not self._is_read, "the real one would wait for ever for what has been taken"
        if self._engine.late is not None:
            raise self._engine.late

    async def __aiter__(self) -> AsyncIterator[tuple[int, Update]]:
        self._is_read = True
        for step, word in enumerate(self._engine.words):
            for index in range(self._request.n):
                await asyncio.sleep(self._engine.step_s)
                if self._is_cancelled:
                    yield index, Update(finish=finish(FinishReason.ABORT, step))
                    continue
                if self._engine.is_stopped:
                    raise UnavailableError("stopped")
                if step == self._engine.fail_at:
                    raise self._engine.failure
                yield index, self._update(step, word)
            if self._is_cancelled:
                break
        self._is_done = True

    def _update(self, step: int, word: str) -> Update:
        logprobs: tuple[TokenLogprob, ...] = ()
        if self._request.sampling.logprobs is not None:
            logprobs = (TokenLogprob(step, -0.5, ((step, -0.5),)),)
        last = step == len(self._engine.words) - 1
        prompt: tuple[TokenLogprob, ...] = ()
        if step == 0 and self._request.sampling.prompt_logprobs is not None:
            prompt = tuple(TokenLogprob(t, -1.5, ((t, -1.5),)) for t in self.prompt_ids[1:])
        end = finish() if last else None
        return Update(word, (step,), logprobs, end, prompt_logprobs=prompt)


class FakeEngine:
    """Stands in for ``Engine``; its attributes script what happens."""

    model_name, device, dtype, attention = "fake", "cpu", "float32", "reference"
    max_context_tokens = 1000
    tokenizer = Tokenizer.load(Path(service.__file__).parent / "default_model")
    default_method = ("streaming", "v1")
    notes = ("2 MLPs are fused.",)
    self_test = SelfTestReport(error=1e-6, tolerance=1e-3, prompt_lens=(13,))

    def __init__(self, settings: Settings | None = None, events: EngineEvents | None = None):
        self.settings = settings or Settings()
        self.events: EngineEvents = events or NoEvents()
        self.words: tuple[str, ...] = WORDS
        self.step_s = 0.0
        self.fail_at: int | None = None
        self.failure: Exception = ServiceError("scripted")
        self.refusal: Exception | None = None
        self.late: Exception | None = None
        self.requests: list[GenerationRequest] = []
        self.num_running = self.num_aborted = 0
        self.is_alive = self.is_draining = self.is_stopped = False

    @classmethod
    def load(cls, settings: Settings, events: EngineEvents, _progress: object = None):
        return cls(settings, events)

    def calibrated(self, method: SparseAttentionMethod) -> SparseAttentionMethod:
        return method

    async def submit(self, request: GenerationRequest) -> FakeGeneration:
        if self.is_draining:
            raise UnavailableError("The server is draining.")
        if self.refusal is not None:
            raise self.refusal
        if len(request.prompt or "") > self.max_context_tokens:
            raise PromptTooLongError("2000 tokens do not fit into 1000.", "prompt")
        self.requests.append(request)
        return FakeGeneration(self, request)

    def status(self) -> EngineStatus:
        reason = "the server is draining" if self.is_draining else ""
        reason = reason if self.is_alive else "the engine thread is not running"
        return EngineStatus(
            loaded=True,
            is_alive=self.is_alive,
            is_draining=self.is_draining,
            is_stalled=False,
            reason=reason,
            num_running=self.num_running,
            num_waiting=3,
            num_pages_total=64,
            num_pages_used=16,
        )

    @property
    def is_busy(self) -> bool:
        return self.is_alive

    def watch(self) -> None:
        pass

    def start(self) -> None:
        self.is_alive = True
        self.is_draining = self.is_stopped = False  # a test may serve one engine twice

    def stop(self) -> None:
        self.is_draining = self.is_stopped = True
        self.is_alive = False

    def drain(self) -> None:
        self.is_draining = True

    async def wait_idle(self, timeout_s: float) -> bool:
        return self.num_running == 0


def fake_sequence(method: Any) -> Sequence:
    """Just enough of a sequence for the events."""
    sequence = object.__new__(Sequence)
    sequence.method = method
    return sequence


def fake_app(engine: FakeEngine, settings: Settings | None = None) -> FastAPI:
    def load(events: EngineEvents) -> Any:
        engine.events = events
        return engine

    return create_app(settings or engine.settings, load)


@asynccontextmanager
async def http_client(
    engine: FakeEngine, settings: Settings | None = None
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an application whose engine has loaded."""
    app = fake_app(engine, settings)
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        await asyncio.to_thread(wait_until, lambda: app.state.holder.is_loaded)
        yield client


@contextmanager
def running_server(engine: FakeEngine, settings: Settings | None = None) -> Iterator[str]:
    """A real server in a thread; yields its address."""
    settings = (settings or engine.settings).model_copy(update={"port": 0})
    addresses: list[str] = []
    server = Server(settings, fake_app(engine, settings), addresses.append)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: bool(addresses))
        yield addresses[0]
    finally:
        server.should_exit = True
        thread.join(20)
    assert not thread.is_alive()


def wait_until(condition: Any, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def _main() -> None:
    settings = Settings(port=0, shutdown_timeout_s=float(sys.argv[2]))
    engine = FakeEngine(settings)
    engine.step_s = float(sys.argv[1])
    logging.basicConfig(level="INFO")
    server = Server(settings, fake_app(engine), lambda address: print(address, flush=True))  # noqa: T201
    server.run()
    sys.exit(server.exit_code)


if __name__ == "__main__":
    _main()
