"""The service as an application of Ray Serve: each replica is one engine behind ``create_app``.

Ray routes, queues, scales and replaces; ``service`` knows nothing of it. Settings are those of
``sparseserve serve``, read from the environment of the node on which a replica starts; what only
this file needs are the ``args`` of the application.
"""

import asyncio
import socket
from collections.abc import Callable
from functools import partial

import uvicorn
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_METRICS = "/metrics"
_LOADING_POLL_S = 0.1


class Arguments(BaseModel):
    """The ``args`` of the application: where each replica shows its own metrics."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    metrics_host: str = Field("127.0.0.1", description="Address to listen on.")
    metrics_port: int = Field(9464, ge=1, le=65535, description="First port to try.")
    max_replicas_per_node: int = Field(
        8, ge=1, le=64, description="How many ports to try, one after another."
    )


class Replica:
    """One engine; it starts when the model is loaded, and is replaced when it is not ready."""

    def __init__(self, arguments: Arguments) -> None:
        self._arguments = arguments

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Build the application in the replica's process, and show its metrics beside it."""
        # Imported here: Ray's controller imports this file too, and needs no torch.
        from service.engine.engine import Engine
        from service.logs import configure_logging
        from service.main import create_app
        from service.settings import Settings
        from sparse_methods import get_sparse_method

        settings = Settings()
        configure_logging(settings.log_level, style=settings.log_format)
        get_sparse_method(settings.method, None)  # or every request that names none would fail
        app = create_app(settings, partial(Engine.load, settings))
        self._holder = app.state.holder
        own = _Only(app, lambda path: path == _METRICS, f"Only {_METRICS} is served here.")
        server = uvicorn.Server(
            uvicorn.Config(own, lifespan="off", log_config=None, access_log=False)
        )
        listening = _first_free_port(self._arguments)
        self._metrics = asyncio.create_task(server.serve(sockets=[listening]))
        return _Only(
            app,
            lambda path: path != _METRICS,
            "Every replica has metrics of its own, on a port of its own: see docs/ray.md.",
        )

    async def check_health(self) -> None:
        """Return if new requests are taken; the first check, which ends the start, waits for that.

        Raises:
            UnavailableError: The model could not be loaded, the engine died, or it makes no
                progress; Ray then replaces the replica.
        """
        from service.errors import UnavailableError

        while not self._holder.is_loaded:
            if (failure := self._holder.failure) is not None:
                # Whatever it is: what is no Exception would end Ray's own event loop.
                raise UnavailableError(f"The model could not be loaded: {failure}.") from failure
            await asyncio.sleep(_LOADING_POLL_S)
        if self._metrics.done():
            raise UnavailableError("The metrics of this replica can no longer be read.")
        if reason := self._holder.status().reason:
            raise UnavailableError(f"Not ready: {reason}.")


def build(arguments: Arguments) -> serve.Application:
    """Build the application; Ray calls this with the ``args`` of its configuration."""
    deployment = serve.deployment(name="sparseserve")(serve.ingress()(Replica))
    return deployment.bind(arguments)


class _Only:
    """An application of which some paths are served, and the others are not there."""

    def __init__(self, app: ASGIApp, allows: Callable[[str], bool], hint: str) -> None:
        self._app, self._allows, self._hint = app, allows, hint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        from service.api.errors import error_response
        from service.errors import NotFoundError

        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif self._allows(scope["path"]):
            await self._app(scope, receive, _without_repeated_id(scope, send))
        else:
            await error_response(NotFoundError(self._hint))(scope, receive, send)


def _without_repeated_id(scope: Scope, send: Send) -> Send:
    """Ray's proxy names requests that have no id, and adds the id to answers as we do."""
    given_id = Headers(scope=scope).get("x-request-id")

    async def send_once(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            if headers.get("x-request-id") == given_id:
                del headers["x-request-id"]
        await send(message)

    return send_once


def _first_free_port(arguments: Arguments) -> socket.socket:
    first = arguments.metrics_port
    for port in range(first, first + arguments.max_replicas_per_node):
        family = socket.AF_INET6 if ":" in arguments.metrics_host else socket.AF_INET
        listening = socket.socket(family)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((arguments.metrics_host, port))
            listening.listen()
        except OSError:  # another replica's
            listening.close()
            continue
        return listening
    raise OSError(f"no port is free from {first} on; raise max_replicas_per_node")
