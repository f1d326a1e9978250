"""The application, put together; ``service/server.py`` runs it."""

import asyncio
import gc
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from service.api import generate, health, methods, running
from service.api.body import BodyBudget
from service.api.errors import install_error_handlers
from service.api.health import server_version
from service.api.holder import EngineHolder, LoadEngine
from service.api.middleware import ApiKeys, ConnectionLimit, RequestContext
from service.api.openai import chat, completions, models, tokens
from service.api.running import RunningRequests
from service.metrics import Metrics
from service.settings import Settings
from service.tracing import Tracing

_BODIES_AT_ONCE = 32  # of the largest size; of smaller ones as many more
# Python lets a thread compute for 5 ms while others wait: the engine's would lose a decode step to
# every few requests that are parsed.
_SWITCH_INTERVAL_S = 0.0005
_PROBES = frozenset({"/health", "/health/live", "/health/ready"})


def create_app(settings: Settings, load: LoadEngine) -> FastAPI:
    """Build the application; its engine loads in a thread once the application starts.

    Args:
        settings: Settings of the operator.
        load: Returns the engine, which then reports to the events it was given. It is called
            with the application's metrics, for instance ``partial(Engine.load, settings)``.

    Raises:
        ServiceError: Spans are asked for without the packages that make them.
    """
    metrics, holder = Metrics(), EngineHolder(load)
    endpoint = settings.traces_endpoint
    tracing = Tracing.to_otlp(endpoint, server_version()) if endpoint else None

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        gc.freeze()  # what has been imported stays; loading may collect often
        interval_before = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        holder.start(metrics)
        yield
        sys.setswitchinterval(interval_before)
        await asyncio.to_thread(holder.stop)
        if tracing is not None:
            await asyncio.to_thread(tracing.flush)
        gc.unfreeze()  # or extension modules report what is frozen as leaked

    app = FastAPI(
        title="sparseserve",
        version=server_version(),
        description="Serves a causal LM whose sparse attention method each request chooses.",
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.settings, app.state.metrics, app.state.holder = settings, metrics, holder
    app.state.running, app.state.started_at = RunningRequests(), int(time.time())
    app.state.body_budget = BodyBudget(_BODIES_AT_ONCE * settings.max_body_bytes)
    metrics.watch(holder.status, lambda: _build_labels(holder))
    if settings.vllm_metric_aliases:
        metrics.alias_for_vllm(holder.status, lambda: _model_name(holder), settings.block_size)
    install_error_handlers(app)
    for module in (generate, completions, chat, models, tokens, methods, running, health):
        app.include_router(module.router)
    if settings.api_keys:
        keys = [key.get_secret_value() for key in settings.api_keys]
        public = _PROBES if settings.metrics_need_key else _PROBES | {"/metrics"}
        app.add_middleware(ApiKeys, keys=keys, public_paths=public)
    app.add_middleware(ConnectionLimit, allowed_paths=_PROBES | {"/metrics"})
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "X-Sparse-Method", "X-Sparse-Version"],
        )
    # The outermost is added last.
    app.add_middleware(RequestContext, count=metrics.http_request, tracing=tracing)
    return app


def _model_name(holder: EngineHolder) -> str | None:
    return holder.engine.model_name if holder.is_loaded else None


def _build_labels(holder: EngineHolder) -> dict[str, str] | None:
    if not holder.is_loaded:
        return None
    engine = holder.engine
    return {
        "version": server_version(),
        "model": engine.model_name,
        "device": engine.device,
        "attention": engine.attention,
    }
