"""Reads a Dockerfile as far as ours uses the language, for tests that check or execute it."""

import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
_VARIABLE = re.compile(r"\$(?:{(\w+)}|(\w+))")
_FLAG = re.compile(r"--(\w[\w-]*)=(\S+)\s+")


@dataclass
class Step:
    """One instruction: its flags, and the rest of the line with variables filled in."""

    name: str
    flags: dict[str, str]
    text: str


@dataclass
class Stage:
    """A stage with all that its steps say about how it runs.

    Attributes:
        base: The image or the stage it starts from.
        environment: Variables of ENV, those of the stage it starts from included.
        arguments: Variables of ARG, which only its RUN steps see.
    """

    name: str
    base: str
    environment: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, str] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)

    def last(self, name: str) -> Step:
        return next(step for step in reversed(self.steps) if step.name == name)

    def command(self) -> list[str]:
        entry, more = (json.loads(self.last(name).text) for name in ("ENTRYPOINT", "CMD"))
        return [*entry, *more]

    def health_command(self) -> list[str]:
        words: list[str] = json.loads(self.last("HEALTHCHECK").text.removeprefix("CMD"))
        return words


def instructions(text: str) -> list[tuple[str, str]]:
    """Name and argument of every instruction; comments and line ends are gone."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    pairs = (line.strip().partition(" ") for line in joined.splitlines() if line.strip())
    return [(name.upper(), rest.strip()) for name, _, rest in pairs]


def stages(variant: str) -> dict[str, Stage]:
    """The stages of our Dockerfile for one variant, by name."""
    arguments: dict[str, str] = {}
    found: dict[str, Stage] = {}
    stage: Stage | None = None
    for name, rest in instructions((ROOT / "Dockerfile").read_text()):
        if name == "FROM":
            base, _, alias = _filled(rest, arguments).partition(" AS ")
            inherited = dict(found[base].environment) if base in found else {}
            stage = found[alias] = Stage(alias, base, inherited)
        elif name == "ARG":
            key, _, value = rest.partition("=")
            (arguments if stage is None else stage.arguments)[key] = value.strip('"')
            arguments["VARIANT"] = variant
        else:
            assert stage is not None
            _add(stage, name, rest)
    return found


def _add(stage: Stage, name: str, rest: str) -> None:
    flags = dict(_FLAG.findall(rest))
    rest = _FLAG.sub("", rest) if flags else rest
    if name == "ENV":
        pairs = (word.partition("=") for word in shlex.split(rest))
        before = {"PATH": "/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin:/bin:/sbin"}
        known = before | stage.environment
        stage.environment |= {key: _filled(value, known) for key, _, value in pairs}
    stage.steps.append(Step(name, flags, rest))


def _filled(text: str, values: dict[str, str]) -> str:
    return _VARIABLE.sub(lambda match: values[match[1] or match[2]], text)
