"""``GET /v1/models``: the one model of this server."""

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from service.api.deps import EngineDep
from service.api.errors import documented_errors
from service.api.openai.submission import check_model
from service.engine.engine import Engine

router = APIRouter(tags=["openai"])


class ModelCard(BaseModel):
    """A model, as OpenAI and vLLM describe one."""

    id: str
    object: str
    created: int = Field(description="When the server started, in seconds since 1970.")
    owned_by: str
    root: str
    parent: None
    max_model_len: int = Field(description="Tokens of prompt and answer together.")
    permission: list[dict[str, str]] = Field(description="Always empty.")


class ModelList(BaseModel):
    """Every model of this server."""

    object: str
    data: list[ModelCard]


@router.get("/v1/models", responses=documented_errors(401, 503))
async def get_models(request: Request, engine: EngineDep) -> ModelList:
    """List the model that is served."""
    return ModelList(object="list", data=[_card(request, engine)])


@router.get("/v1/models/{model_id:path}", responses=documented_errors(401, 404, 503))
async def get_model(model_id: str, request: Request, engine: EngineDep) -> ModelCard:
    """Show the model that is served."""
    check_model(engine, model_id)
    return _card(request, engine)


def _card(request: Request, engine: Engine) -> ModelCard:
    return ModelCard(
        id=engine.model_name,
        object="model",
        created=request.app.state.started_at,
        owned_by="sparseserve",
        root=engine.model_name,
        parent=None,
        max_model_len=engine.max_context_tokens,
        permission=[],
    )
