"""What ``/v1/completions`` and ``/v1/chat/completions`` have in common in their requests."""

import dataclasses
from typing import Annotated, Any, Self

import orjson
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from typing_extensions import override

from service.api.openai.harmless import HarmlessFields
from service.api.openai.structured import ResponseFormat, StructuredOutputs, grammar_of
from service.api.schemas import MethodFields, SamplingFields, SchedulingFields
from service.engine.grammar import Grammar
from service.engine.sequence import SamplingParams
from service.errors import BadRequestError

_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)
_TokenKey = Annotated[str, Field(pattern="^(0|[1-9][0-9]{0,8})$")]  # one spelling
_Bias = Annotated[float, Field(ge=-100, le=100)]


def in_words(shape: str) -> WrapValidator:
    """Say in words what a union takes, of which pydantic would name some branch."""

    def check(value: object, validate: ValidatorFunctionWrapHandler) -> object:
        try:
            return validate(value)
        except ValidationError:
            raise ValueError(f"this must be {shape}") from None

    return WrapValidator(check)


class StreamOptions(BaseModel):
    """What a stream tells besides the text."""

    model_config = _STRICT

    include_usage: bool = Field(False, description="Whether a last chunk has the usage.")  # noqa: FBT003 - a default
    continuous_usage_stats: bool = Field(
        False,  # noqa: FBT003 - a default
        description="Whether, with include_usage, every chunk has it.",
    )
    include_obfuscation: bool = Field(True, description="Taken and not used.")  # noqa: FBT003 - a default


def _parsed(value: object) -> object:
    """Clients of vLLM may send no objects in vllm_xargs, but JSON in a string."""
    if not isinstance(value, str):
        return value
    try:
        return orjson.loads(value)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"the string is not valid JSON: {error.msg}") from None


class ExtraArguments(MethodFields):
    """The method of a request, where clients of vLLM put what vLLM does not know."""

    model_config = _STRICT

    method_params: Annotated[
        dict[str, Any] | None,
        BeforeValidator(_parsed, json_schema_input_type=dict[str, Any] | str | None),
    ] = Field(None, description="Knobs of the method, as an object or as JSON in a string.")


def _nullable(schema: dict[str, Any]) -> None:
    """Say in a schema what ``OpenAIFields`` does with null."""
    optional = set(schema["properties"]) - set(schema.get("required", ()))
    for name in optional:
        known = schema["properties"][name]
        if {"type": "null"} not in known.get("anyOf", ()) and None not in known.get("enum", ()):
            description = {k: known.pop(k) for k in ("description", "title") if k in known}
            schema["properties"][name] = {"anyOf": [known, {"type": "null"}], **description}


class OpenAIFields(SchedulingFields, MethodFields, SamplingFields, HarmlessFields):
    """Null is as good as leaving a field out, because clients of OpenAI send it for that."""

    model_config = ConfigDict(json_schema_extra=_nullable)

    model: str | None = Field(None, description="Name from GET /v1/models; null takes it.")
    stream: bool = Field(False, description="Whether to send server-sent events.")  # noqa: FBT003 - a default
    stream_options: StreamOptions | None = Field(None, description="Needs stream.")
    logit_bias: Annotated[dict[_TokenKey, _Bias], Field(max_length=1024)] = Field(
        default_factory=dict, description="Token ids, and what is added to the logit of each."
    )
    response_format: ResponseFormat | None = Field(None, description="What the text must be like.")
    structured_outputs: StructuredOutputs | None = Field(
        None, description="The same as vLLM has it; excludes response_format."
    )
    vllm_xargs: ExtraArguments | None = Field(
        None, description="method, version, method_params and sparsity_detail, as vLLM sends them."
    )

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nulls(cls, content: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in content.items() if value is not None}

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise BadRequestError("stream_options needs stream to be true.", "stream_options")
        return self

    @model_validator(mode="after")
    def _take_extra_arguments(self) -> Self:
        extra = self.vllm_xargs or ExtraArguments()
        for name in extra.model_fields_set:
            given = getattr(extra, name)
            if given is None:
                continue
            if name in self.model_fields_set and getattr(self, name) != given:
                raise BadRequestError(
                    f"The body says {name}={_shown(getattr(self, name))}, but its vllm_xargs say"
                    f" {_shown(given)}. Give it once, or the same in both.",
                    name,
                )
            setattr(self, name, given)
        return self

    @model_validator(mode="after")
    def _check_grammar(self) -> Self:
        if (self.min_tokens or self.ignore_eos) and self.grammar is not None:
            raise BadRequestError(
                "A text with a format ends where it is complete: min_tokens and ignore_eos"
                " exclude it.",
                "min_tokens" if self.min_tokens else "ignore_eos",
            )
        return self

    @property
    def grammar(self) -> Grammar | None:
        """What the text must be like; None leaves it free."""
        return grammar_of(self.response_format, self.structured_outputs)

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with a chunk on usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continues_usage(self) -> bool:
        """Whether every chunk of a stream tells the usage so far."""
        options = self.stream_options
        return options is not None and options.include_usage and options.continuous_usage_stats

    @override
    def sampling(self) -> SamplingParams:
        biases = {int(token): bias for token, bias in self.logit_bias.items()}
        return dataclasses.replace(
            super().sampling(), logit_bias=tuple(biases.items()), grammar=self.grammar
        )


def _shown(value: object) -> str:
    return repr(value)[:80]
