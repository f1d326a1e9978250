"""What probes, scrapers and operators ask; none of it runs the model or waits for it."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from service.api.deps import EngineDep, HolderDep
from service.api.errors import documented_errors
from service.errors import UnavailableError

router = APIRouter(tags=["operations"])


class Health(BaseModel):
    """A probe's answer."""

    status: str


class Version(BaseModel):
    """Version of the server."""

    version: str


class ServerInfo(BaseModel):
    """What this server runs and how busy it is."""

    version: str
    model: str
    device: str
    dtype: str
    attention: str = Field(description="Attention implementation in use.")
    notes: list[str] = Field(description="On the model and which of its modules were fused.")
    self_test: dict[str, Any] | None = Field(description="What was measured when it was loaded.")
    max_context_tokens: int
    default_method: dict[str, str]
    status: dict[str, Any]
    settings: dict[str, Any] = Field(description="Without keys and paths.")


def server_version() -> str:
    """Version of the installed distribution."""
    try:
        return version("sparseserve")
    except PackageNotFoundError:  # run from a checkout
        return "0.0.0"


@router.get("/health/live")
async def live() -> Health:
    """Whether the process answers."""
    return Health(status="ok")


@router.get("/health/ready", responses=documented_errors(503))
@router.get("/health", responses=documented_errors(503))
async def ready(holder: HolderDep) -> Health:
    """Whether new requests are taken: loaded, not draining, and making progress."""
    status = holder.status()
    if status.reason:
        raise UnavailableError(f"Not ready: {status.reason}.")
    return Health(status="ready")


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """Metrics in Prometheus' text format."""
    content, content_type = request.app.state.metrics.render()
    return Response(content, headers={"Content-Type": content_type})


@router.get("/version", responses=documented_errors(401))
async def get_version() -> Version:
    """Version of the server."""
    return Version(version=server_version())


@router.get("/server_info", responses=documented_errors(401, 503))
async def get_server_info(engine: EngineDep) -> ServerInfo:
    """What this server runs, with which settings, and how busy it is."""
    method, method_version = engine.default_method
    return ServerInfo(
        version=server_version(),
        model=engine.model_name,
        device=engine.device,
        dtype=engine.dtype,
        attention=engine.attention,
        notes=list(engine.notes),
        self_test=None if engine.self_test is None else vars(engine.self_test),
        max_context_tokens=engine.max_context_tokens,
        default_method={"method": method, "version": method_version},
        status=vars(engine.status()),
        settings=engine.settings.model_dump(
            mode="json", exclude={"api_keys", "model", "calibration"}
        ),
    )
