"""The request of ``POST /generate``; fields on sampling and method are every route's."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from typing_extensions import override

from service.engine.sequence import SamplingParams
from service.errors import BadRequestError

_INT64 = 2**63
_MAX_TOKEN_ID = 2**31 - 1

SparsityDetail = Literal["none", "summary", "layer", "head"]
TokenId = Annotated[int, Field(ge=0, le=_MAX_TOKEN_ID)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]
# What a client may send.
_Stop = StopString | Annotated[list[StopString], Field(max_length=16)] | None


def _as_list(value: object) -> object:
    """Take null for none and a bare value for one."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _none_as_empty(value: object) -> object:
    return [] if value is None else value


class SamplingFields(BaseModel):
    """How tokens are chosen and when a choice ends; ranges are vLLM's."""

    model_config = ConfigDict(
        strict=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True
    )

    max_tokens: int = Field(
        128, ge=1, le=_MAX_TOKEN_ID, description="Most new tokens; the context may allow fewer."
    )
    min_tokens: int = Field(0, ge=0, description="New tokens before the answer may end.")
    temperature: float = Field(1.0, ge=0, le=2, description="0 takes the most likely token.")
    top_p: float = Field(1.0, gt=0, le=1, description="Probability mass of the tokens kept.")
    top_k: int = Field(0, ge=-1, le=_MAX_TOKEN_ID, description="Tokens kept; 0 or -1 keeps all.")
    min_p: float = Field(
        0.0, ge=0, le=1, description="Least probability kept, relative to the most likely token's."
    )
    repetition_penalty: float = Field(
        1.0, ge=0.01, le=10, description="Divides the logits of tokens seen; 1 changes nothing."
    )
    presence_penalty: float = Field(
        0.0, ge=-2, le=2, description="Subtracted from the logits of tokens generated before."
    )
    frequency_penalty: float = Field(
        0.0, ge=-2, le=2, description="Subtracted per earlier occurrence among generated tokens."
    )
    seed: int | None = Field(
        None, ge=-_INT64, lt=_INT64, description="Makes sampling repeatable; null draws one."
    )
    stop: Annotated[list[StopString], BeforeValidator(_as_list, json_schema_input_type=_Stop)] = (
        Field(
            default_factory=list,
            max_length=16,
            description="A string or list of strings that end the answer and are left out of it.",
        )
    )
    stop_token_ids: Annotated[list[TokenId], BeforeValidator(_none_as_empty)] = Field(
        default_factory=list, max_length=64, description="Tokens that end the answer."
    )
    ignore_eos: bool = Field(False, description="Whether to go on after the end of sequence.")  # noqa: FBT003 - a default
    n: int = Field(1, ge=1, le=16, description="Choices generated from the one prompt.")

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.min_tokens > self.token_limit:
            raise BadRequestError(
                f"min_tokens ({self.min_tokens}) is larger than max_tokens ({self.token_limit}).",
                "min_tokens",
            )
        if self.n > 1 and self.temperature == 0:
            raise BadRequestError("With temperature 0 all choices are the same; n must be 1.", "n")
        return self

    @property
    def token_limit(self) -> int:
        """Most new tokens, by whatever field the route takes it."""
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Most likely tokens to report per position; None reports nothing."""
        return None

    def sampling(self) -> SamplingParams:
        """The engine's view of these fields."""
        values = self.model_dump(include=set(SamplingFields.model_fields) - {"n"})
        values["max_tokens"] = self.token_limit
        values["logprobs"] = self.num_logprobs
        values["top_k"] = max(0, self.top_k)
        values["stop"] = tuple(self.stop)
        values["stop_token_ids"] = tuple(self.stop_token_ids)
        return SamplingParams(**values)


class MethodFields(BaseModel):
    """Which sparse attention method a request runs through; all of it may be left out."""

    method: str | None = Field(
        None, description="Name from GET /methods; null takes the server's default."
    )
    version: str | None = Field(None, description="Version such as 'v1'; null takes the latest.")
    method_params: dict[str, Any] | None = Field(
        None, description="Knobs of the method; GET /methods has their schema."
    )
    sparsity_detail: SparsityDetail = Field(
        "summary", description="How finely the answer reports what attention left out."
    )


class SchedulingFields(BaseModel):
    """When a request runs, how long it may take, and whose computed prompts it may share."""

    priority: int = Field(0, ge=-(2**31), lt=2**31, description="Lower values are served earlier.")
    timeout_s: float | None = Field(
        None,
        gt=0,
        le=86400,
        description="Seconds after which the answer ends with what there is (finish_reason abort);"
        " a request whose turn has not come by then gets a 503.",
    )
    cache_salt: str | None = Field(
        None,
        min_length=1,
        max_length=256,
        description="Only requests of the same salt reuse each other's computed prompts; one that"
        " nobody else uses makes sure that all of the prompt is computed, and counted.",
    )


class GenerateRequest(SchedulingFields, MethodFields, SamplingFields):
    """One prompt to complete."""

    prompt: str | None = Field(
        None, description="Text to complete; exactly one of this and prompt_token_ids."
    )
    prompt_token_ids: list[TokenId] | None = Field(
        None, fail_fast=True, description="Tokens to complete; exactly one of this and prompt."
    )
    logprobs: int | None = Field(
        None, ge=0, le=20, description="Most likely tokens reported per position; null is none."
    )
    stream: bool = Field(False, description="Whether to send server-sent events.")  # noqa: FBT003 - a default

    @property
    @override
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @model_validator(mode="after")
    def _check_prompt(self) -> Self:
        if (self.prompt is None) == (self.prompt_token_ids is None):
            raise BadRequestError(
                "Give exactly one of 'prompt' (text) and 'prompt_token_ids' (list of ids).",
                "prompt",
            )
        if self.prompt == "":
            raise BadRequestError("The prompt is empty; give at least one character.", "prompt")
        if self.prompt_token_ids == []:
            raise BadRequestError(
                "The prompt is empty; give at least one token.", "prompt_token_ids"
            )
        return self
