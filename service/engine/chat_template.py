"""How the turns of a chat become one prompt: by the model's own template, or by a plain one."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from service.errors import BadRequestError

Message = Mapping[str, str]  # role, content and perhaps name
_ASSISTANT = "Assistant"
# Of transformers, not of templates: a client may set variables of a template and nothing else.
_RESERVED = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)


@dataclass(frozen=True)
class ChatPrompt:
    """The prompt of a chat.

    Attributes:
        adds_special_tokens: Whether special tokens still have to be put around it.
        stop: Strings that end the answer, where the model has no token for the end of a turn.
    """

    text: str
    adds_special_tokens: bool
    stop: tuple[str, ...] = ()


class ChatTemplate:
    """Renders chats for one model.

    A model without a template gets the plain one: each turn is a paragraph ``Name: text``, where
    the name is the message's own or else its role, such as ``User``; the last paragraph is
    ``Assistant:``, for the model to complete. Such a model does not know where its turn ends, so
    the answer ends before a paragraph that begins with the name of the user.

    Args:
        tokenizer: The tokenizer that holds the template; None takes the plain one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        has_own = tokenizer is not None and tokenizer.chat_template is not None
        self._tokenizer = tokenizer if has_own else None

    @property
    def is_plain(self) -> bool:
        """Whether the model brought no template."""
        return self._tokenizer is None

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> ChatPrompt:
        """Write the turns out.

        Args:
            messages: The turns, oldest first; at least one.
            add_generation_prompt: Whether the turn of the assistant is opened at the end.
            continue_final_message: Whether the last turn is left open instead.
            variables: Further variables of the model's template.

        Raises:
            BadRequestError: The template refuses the messages or the variables.
        """
        if add_generation_prompt and continue_final_message:
            raise BadRequestError(
                "continue_final_message goes on with the last message, so add_generation_prompt"
                " must be false.",
                "continue_final_message",
            )
        reserved = next(filter(_RESERVED.__contains__, variables or {}), None)
        if reserved is not None:
            raise BadRequestError(
                f"chat_template_kwargs may set variables of the template, not {reserved!r}.",
                "chat_template_kwargs",
            )
        if self._tokenizer is None:
            return _plain(messages, opens_turn=add_generation_prompt)
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **(variables or {}),
            )
        except Exception as error:
            # A template is a program that the model brings; this is how it says no.
            message = f"The model's chat template refuses these messages: {error}"
            raise BadRequestError(message, "messages") from error
        if not isinstance(text, str) or not text:
            raise BadRequestError("The model's chat template makes no prompt of them.", "messages")
        return ChatPrompt(text, adds_special_tokens=False)


def _plain(messages: Sequence[Message], *, opens_turn: bool) -> ChatPrompt:
    paragraphs = [f"{_name(message)}: {message['content']}" for message in messages]
    if opens_turn:
        paragraphs.append(f"{_ASSISTANT}:")
    users = ["User", *(_name(message) for message in messages if message["role"] == "user")]
    stop = dict.fromkeys(f"\n\n{name}:" for name in (users[0], users[-1]))
    return ChatPrompt("\n\n".join(paragraphs), adds_special_tokens=True, stop=tuple(stop))


def _name(message: Message) -> str:
    return message.get("name") or message["role"].capitalize()
