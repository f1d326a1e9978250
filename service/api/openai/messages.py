"""The turns of a chat as OpenAI's clients send them."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from service.api.openai.fields import in_words
from service.api.openai.harmless import Only

_STRICT = ConfigDict(strict=True, extra="forbid", hide_input_in_errors=True)


class TextPart(BaseModel):
    """A piece of a message; only text is understood."""

    model_config = _STRICT

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One turn. What an answer's message holds besides may be sent back with it."""

    model_config = _STRICT

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        str | Annotated[list[TextPart], Field(min_length=1, max_length=1024)],
        in_words("text, or a list of up to 1024 parts of the type 'text'; no other is understood"),
    ]
    name: str | None = Field(None, min_length=1, max_length=64, description="Of the speaker.")
    refusal: Annotated[Any, Only([])] = None
    tool_calls: Annotated[Any, Only([[]])] = None
    function_call: Annotated[Any, Only([])] = None
    audio: Annotated[Any, Only([])] = None
    annotations: Annotated[Any, Only([[]])] = None

    def as_turn(self) -> dict[str, str]:
        """What a template reads; parts of text are lines, and a developer speaks as the system."""
        text = self.content
        turn = {
            "role": "system" if self.role == "developer" else self.role,
            "content": text if isinstance(text, str) else "\n".join(part.text for part in text),
        }
        return turn if self.name is None else {**turn, "name": self.name}


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=4096, fail_fast=True)]


class TemplateFields(BaseModel):
    """How the turns become a prompt."""

    add_generation_prompt: bool = Field(
        True,  # noqa: FBT003 - a default
        description="Whether the turn of the assistant is opened.",
    )
    continue_final_message: bool = Field(
        False,  # noqa: FBT003 - a default
        description="Whether the answer goes on with the last turn; add_generation_prompt must"
        " be false.",
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Variables of the model's template."
    )
