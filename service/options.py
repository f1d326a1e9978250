"""Command line options made from the fields of a pydantic model, so that nothing is said twice."""

import inspect
from collections.abc import Callable, Collection
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from service.errors import ServiceError

_PLAIN_TYPES = (bool, int, float, str, Path)


class OptionGroup:
    """The fields of a model that a command takes as options."""

    def __init__(self, model: type[BaseModel], without: Collection[str] = ()) -> None:
        self._model = model
        self._fields = {
            name: (kind, field)
            for name, field in model.model_fields.items()
            if name not in without and (kind := _plain_type(field.annotation)) is not None
        }

    def parameters(self) -> list[inspect.Parameter]:
        """One keyword-only parameter per field; None means that the option was not given."""
        return [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[kind | None, _option(field)],
            )
            for name, (kind, field) in self._fields.items()
        ]

    def build(self, values: dict[str, Any]) -> BaseModel:
        """Take the values of these options out of ``values`` and validate them."""
        given = {name: values.pop(name) for name in self._fields}
        try:
            return self._model(**{k: v for k, v in given.items() if v is not None})
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            name = ".".join(str(part) for part in first["loc"]).replace("_", "-")
            raise typer.BadParameter(f"{first['msg']}.", param_hint=f"--{name}") from None
        except ServiceError as error:
            raise typer.BadParameter(str(error)) from None


def with_options(**groups: OptionGroup) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a command: the parameter named like a group gets the model the options make."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def run(**values: Any) -> None:  # noqa: ANN401 - whatever the options hold
            models = {name: group.build(values) for name, group in groups.items()}
            command(**values, **models)

        signature = inspect.signature(command)
        own = [p for p in signature.parameters.values() if p.name not in groups]
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        for group in groups.values():
            parameters += group.parameters()
        # Typer reads the signature: this is where the options come into being.
        vars(run)["__signature__"] = inspect.Signature(parameters)
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate


def _option(field: FieldInfo) -> Any:  # noqa: ANN401 - as Typer declares it
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    default = field.get_default(call_default_factory=True, validated_data={})
    return typer.Option(
        help=f"{field.description}" + ("" if default is None else f" Default: {default}."),
        metavar="[" + "|".join(choices) + "]" if choices else None,
    )


def _plain_type(annotation: Any) -> type | None:  # noqa: ANN401 - any annotation
    """The type an option of this annotation is read as; None if it cannot be an option."""
    if get_origin(annotation) in {Union, UnionType}:
        inner = [arg for arg in get_args(annotation) if arg is not NoneType]
        annotation = inner[0] if len(inner) == 1 else None
    if get_origin(annotation) is Literal:
        return str
    return annotation if annotation in _PLAIN_TYPES else None
