"""``response_format`` and ``structured_outputs``: what the text must be like."""

from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field

from service.engine.grammar import Grammar
from service.errors import BadRequestError

_STRICT = ConfigDict(strict=True, extra="forbid", hide_input_in_errors=True)
_ANY_OBJECT = '{"type":"object"}'
_Source = Annotated[str, Field(min_length=1, max_length=65536)]


class TextFormat(BaseModel):
    """Whatever the model says."""

    model_config = _STRICT

    type: Literal["text"]


class JsonObjectFormat(BaseModel):
    """Some JSON object."""

    model_config = _STRICT

    type: Literal["json_object"]


class NamedSchema(BaseModel):
    """A JSON schema as OpenAI wraps it."""

    model_config = _STRICT

    name: str | None = Field(None, description="Taken and not used.")
    description: str | None = Field(None, description="Taken and not used.")
    strict: bool | None = Field(None, description="Taken and not used: every schema is held.")
    definition: dict[str, Any] = Field(alias="schema", description="The JSON schema.")


class JsonSchemaFormat(BaseModel):
    """JSON that a schema describes."""

    model_config = _STRICT

    type: Literal["json_schema"]
    json_schema: NamedSchema


class RegexFormat(BaseModel):
    """Text that a regular expression describes, from its first character to its last."""

    model_config = _STRICT

    type: Literal["regex"]
    regex: _Source


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat | RegexFormat, Field(discriminator="type")
]


class StructuredOutputs(BaseModel):
    """The same as vLLM has it; exactly one field."""

    model_config = _STRICT

    json_: dict[str, Any] | _Source | None = Field(
        None, alias="json", description="A JSON schema, as an object or as JSON in a string."
    )
    json_object: Literal[True] | None = Field(None, description="Some JSON object.")
    regex: _Source | None = Field(None, description="A regular expression for the whole text.")
    choice: Annotated[list[_Source], Field(min_length=1, max_length=1024)] | None = Field(
        None, description="The texts to choose from."
    )
    grammar: _Source | None = Field(None, description="A grammar in llguidance's Lark.")


def grammar_of(
    response_format: ResponseFormat | None, outputs: StructuredOutputs | None
) -> Grammar | None:
    """The grammar of a request; None if its text is free.

    Raises:
        BadRequestError: There are two, or ``structured_outputs`` has not exactly one field.
    """
    by_format = None if response_format is None else _of_format(response_format)
    if outputs is None:
        return by_format
    if by_format is not None:
        raise BadRequestError(
            "response_format and structured_outputs exclude each other.", "structured_outputs"
        )
    return _of_outputs(outputs)


def _of_format(chosen: ResponseFormat) -> Grammar | None:
    param = "response_format"
    match chosen:
        case TextFormat():
            return None
        case JsonObjectFormat():
            return Grammar("json_schema", _ANY_OBJECT, param)
        case JsonSchemaFormat():
            return Grammar("json_schema", _as_text(chosen.json_schema.definition), param)
        case RegexFormat():
            return Grammar("regex", chosen.regex, param)


def _of_outputs(outputs: StructuredOutputs) -> Grammar:
    param = "structured_outputs"
    grammars = []
    if outputs.json_ is not None:
        schema = outputs.json_
        source = schema if isinstance(schema, str) else _as_text(schema)
        grammars.append(Grammar("json_schema", source, param))
    if outputs.json_object is not None:
        grammars.append(Grammar("json_schema", _ANY_OBJECT, param))
    if outputs.regex is not None:
        grammars.append(Grammar("regex", outputs.regex, param))
    if outputs.choice is not None:
        grammars.append(Grammar("choice", _as_text(outputs.choice), param))
    if outputs.grammar is not None:
        grammars.append(Grammar("lark", outputs.grammar, param))
    if len(grammars) != 1:
        raise BadRequestError(
            "structured_outputs needs exactly one of json, json_object, regex, choice, grammar.",
            param,
        )
    return grammars[0]


def _as_text(value: object) -> str:
    return orjson.dumps(value).decode()
