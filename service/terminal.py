"""What the command line draws: the loading bar and the tables."""

import json
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table

from sparse_methods import Phase, SparseAttentionMethod, get_sparse_method, list_sparse_methods
from sparse_methods.statistics import RequestStatistics


class LoadingBar:
    """One bar per stage of loading; called from the thread that loads."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self._progress = Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        )
        self._stages: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` parts of a stage are finished."""
        if stage not in self._stages:
            self._stages[stage] = self._progress.add_task(stage, total=total)
        self._progress.update(self._stages[stage], completed=done, total=total)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the bars away; they are not needed twice."""
        self._progress.stop()


def methods_table() -> Table:
    """Every method version with its knobs, for a terminal."""
    table = Table("Method", "What it does, and its knobs", show_lines=True)
    table.columns[0].no_wrap = True
    for cls in _method_classes():
        name = f"{cls.registered_name}\n{cls.registered_version}\n{', '.join(cls.phases)}"
        table.add_row(escape(name), escape("\n".join([_purpose(cls), *_knobs(cls)])))
    return table


def methods_markdown() -> str:
    """The same in Markdown, as the README has it: of knobs their names and defaults only."""
    rows = [
        "| Method | Version | Phases | What it does | Knobs | Source |",
        "|---|---|---|---|---|---|",
    ]
    for cls in _method_classes():
        cells = (
            f"`{cls.registered_name}`",
            cls.registered_version,
            ", ".join(cls.phases),
            _purpose(cls),
            ", ".join(f"`{name}`{default}" for name, default in _defaults(cls)) or "none",
            " ".join(cls.source.split()),
        )
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def sparsity_table(statistics: RequestStatistics) -> Table:
    """What attention left out of one generation."""
    decode = statistics.phase(Phase.DECODE)
    caption = f"decoding read {decode.kv_bytes_read:,} of {decode.kv_bytes_dense:,} KV bytes"
    table = Table("Phase", caption=caption)
    for column in ("Blocks", "Selected", "Skipped", "Density", "Sparsity"):
        table.add_column(column, justify="right")
    rows = {**{p.value: statistics.phase(p) for p in Phase}, "overall": statistics.overall}
    for name, counts in rows.items():
        table.add_row(
            name,
            f"{counts.blocks_total:,}",
            f"{counts.blocks_selected:,}",
            f"{counts.blocks_skipped:,}",
            f"{counts.density:.3f}",
            f"{counts.sparsity:.3f}",
        )
    return table


def _method_classes() -> Iterable[type[SparseAttentionMethod]]:
    for name, versions in list_sparse_methods().items():
        for version in versions:
            yield get_sparse_method(name, version)


def _purpose(cls: type[SparseAttentionMethod]) -> str:
    return cls.description() + (" For evaluation only." if cls.evaluation_only else "")


def _knobs(cls: type[SparseAttentionMethod]) -> list[str]:
    properties: dict[str, dict[str, Any]] = cls.Knobs.model_json_schema().get("properties", {})
    return [_knob(name, schema) for name, schema in properties.items()]


def _defaults(cls: type[SparseAttentionMethod]) -> Iterator[tuple[str, str]]:
    for name, field in cls.Knobs.model_fields.items():
        default = field.get_default(call_default_factory=True)
        yield name, f" {json.dumps(default)}" if default not in (None, {}) else ""


def _knob(name: str, schema: dict[str, Any]) -> str:
    limits = [
        f"{sign} {schema[key]}"
        for key, sign in (
            ("minimum", ">="),
            ("exclusiveMinimum", ">"),
            ("maximum", "<="),
            ("exclusiveMaximum", "<"),
        )
        if key in schema
    ]
    text = f"{name} = {schema.get('default')}"
    text += f" ({', '.join(limits)})" if limits else ""
    return f"{text}: {schema['description']}" if "description" in schema else text
