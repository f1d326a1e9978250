"""Fields of OpenAI's and vLLM's requests that change nothing here.

A client library sends many of them whether its user asked or not. Each is known, taken with the
values that leave the answer as it is, and refused with any other: nothing is ignored in silence.
"""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationInfo,
)
from pydantic_core import CoreSchema

from service.errors import BadRequestError


class Only:
    """In an annotation: the field takes no values but these, and null."""

    def __init__(self, harmless: Sequence[object]) -> None:
        self._harmless = harmless

    def __get_pydantic_core_schema__(
        self,
        source: Any,  # noqa: ANN401 - pydantic's protocol
        handler: GetCoreSchemaHandler,
    ) -> CoreSchema:
        """Let ``check`` see the value before anything else does."""
        return BeforeValidator(self._check).__get_pydantic_core_schema__(source, handler)

    def __get_pydantic_json_schema__(
        self, _schema: CoreSchema, _handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """List the values."""
        return {"enum": [*self._harmless, None], "description": "Without effect."}

    def _check(self, value: object, info: ValidationInfo) -> object:
        # Python finds False equal to 0 and True to 1; JSON does not.
        same = (h for h in self._harmless if isinstance(h, bool) is isinstance(value, bool))
        if value is not None and value not in same:
            allowed = " or ".join(map(_as_json, self._harmless))
            hint = f"leave it out or give {allowed}" if allowed else "leave it out"
            raise BadRequestError(
                f"{info.field_name!r} with this value is not supported by this server; {hint}.",
                info.field_name,
            )
        return value


def _as_json(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value).replace("'", '"')


class HarmlessFields(BaseModel):
    """What both generation routes of OpenAI know and this server has no use for."""

    user: str | None = Field(None, description="Taken and not used.")
    session_id: str | None = Field(None, description="Taken and not used.")
    best_of: Annotated[Any, Only([1])] = None
    use_beam_search: Annotated[Any, Only([False])] = None
    length_penalty: Annotated[Any, Only([1.0])] = None
    include_stop_str_in_output: Annotated[Any, Only([False])] = None
    skip_special_tokens: Annotated[Any, Only([True])] = None
    spaces_between_special_tokens: Annotated[Any, Only([True, False])] = None
    truncate_prompt_tokens: Annotated[Any, Only([])] = None
    allowed_token_ids: Annotated[Any, Only([])] = None
    prompt_logprobs: Annotated[Any, Only([])] = None
    logprob_token_ids: Annotated[Any, Only([])] = None
    bad_words: Annotated[Any, Only([[]])] = None
    prompt_embeds: Annotated[Any, Only([])] = None
    return_tokens_as_token_ids: Annotated[Any, Only([False])] = None
    return_token_ids: Annotated[Any, Only([False])] = None
    kv_transfer_params: Annotated[Any, Only([])] = None


class HarmlessChatFields(BaseModel):
    """What only the chat route of OpenAI knows and this server has no use for."""

    metadata: dict[str, Any] | None = Field(None, description="Taken and not used.")
    safety_identifier: str | None = Field(None, description="Taken and not used.")
    prompt_cache_key: str | None = Field(None, description="Taken and not used.")
    parallel_tool_calls: Annotated[Any, Only([True, False])] = None
    store: Annotated[Any, Only([False])] = None
    service_tier: Annotated[Any, Only(["auto", "default"])] = None
    modalities: Annotated[Any, Only([["text"]])] = None
    audio: Annotated[Any, Only([])] = None
    tools: Annotated[Any, Only([[]])] = None
    tool_choice: Annotated[Any, Only(["none", "auto"])] = None
    functions: Annotated[Any, Only([[]])] = None
    function_call: Annotated[Any, Only(["none", "auto"])] = None
    prediction: Annotated[Any, Only([])] = None
    reasoning_effort: Annotated[Any, Only([])] = None
    verbosity: Annotated[Any, Only([])] = None
    web_search_options: Annotated[Any, Only([])] = None
    documents: Annotated[Any, Only([[]])] = None
    chat_template: Annotated[Any, Only([])] = None
