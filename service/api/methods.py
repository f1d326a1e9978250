"""``GET /methods``: the registry, as clients see it."""

import inspect
from functools import lru_cache
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, Field

from service.api.deps import EngineDep
from service.api.errors import documented_errors
from service.engine.engine import Engine
from service.errors import NotFoundError
from sparse_methods import (
    SparseAttentionMethod,
    UnknownMethodError,
    UnknownVersionError,
    get_sparse_method,
    latest_version,
    list_sparse_methods,
)
from sparse_methods.kernels import IMPLEMENTATIONS

router = APIRouter(tags=["methods"])


class MethodVersion(BaseModel):
    """One version of a method; its behaviour never changes."""

    version: str
    description: str
    source: str = Field(description="Publication or code the rule comes from.")
    phases: list[str] = Field(description="Phases in which it can leave blocks out.")
    evaluation_only: bool = Field(
        description="Whether it costs more than dense attention; /generate refuses it by default."
    )
    params_schema: dict[str, Any] = Field(description="JSON schema of `method_params`.")
    threshold: dict[str, Any] = Field(description="With default knobs.")
    calibrated: bool = Field(description="Whether thresholds were fitted to this model.")
    implementations: list[str]
    hash: str = Field(description="Of the source file: equal hashes decide alike.")


class MethodPage(BaseModel):
    """A method with its versions, oldest first."""

    name: str
    latest: str
    versions: list[MethodVersion]


class DefaultMethod(BaseModel):
    """What a request that names no method runs through."""

    method: str
    version: str


class MethodList(BaseModel):
    """Every method this server can run."""

    default: DefaultMethod
    methods: list[MethodPage]


@router.get("/methods", responses=documented_errors(401, 503))
@router.get("/v1/methods", include_in_schema=False)
async def get_methods(engine: EngineDep) -> MethodList:
    """List every method with its versions and knobs."""
    method, version = engine.default_method
    registry = list_sparse_methods()
    pages = [method_page(engine, name, versions) for name, versions in registry.items()]
    return MethodList(default=DefaultMethod(method=method, version=version), methods=pages)


@router.get("/methods/{name}", responses=documented_errors(401, 404, 503))
@router.get("/v1/methods/{name}", include_in_schema=False)
async def get_method(name: str, engine: EngineDep, version: str | None = None) -> MethodPage:
    """Show one method, with all its versions or the one asked for."""
    try:
        get_sparse_method(name, version)
    except UnknownMethodError as error:
        raise NotFoundError(str(error), "name") from None
    except UnknownVersionError as error:
        raise NotFoundError(str(error), "version") from None
    versions = list_sparse_methods()[name] if version is None else [version]
    return method_page(engine, name, versions)


def method_page(engine: Engine, name: str, versions: list[str]) -> MethodPage:
    """Describe the given versions of a method as this engine runs them."""
    classes = [get_sparse_method(name, version) for version in versions]
    entries = [_method_version(engine.calibrated(cls())) for cls in classes]
    return MethodPage(name=name, latest=latest_version(name), versions=entries)


@lru_cache(maxsize=256)
def _method_version(method: SparseAttentionMethod) -> MethodVersion:
    cls, threshold = type(method), method.get_threshold_info()
    return MethodVersion(
        version=cls.registered_version,
        description=cls.description(),
        source=inspect.cleandoc(cls.source),
        phases=[phase.value for phase in cls.phases],
        evaluation_only=cls.evaluation_only,
        params_schema=cls.Knobs.model_json_schema(),
        threshold=threshold,
        calibrated=threshold.get("type") == "dynamic_calibrated",
        implementations=list(IMPLEMENTATIONS),
        hash=cls.content_hash(),
    )
