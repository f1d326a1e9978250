"""What an evaluation looks like: tables on a terminal, rows of the documentation, a picture."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from service.evaluation.results import Cell
from sparse_methods import SparseAttentionMethod, get_sparse_method, list_sparse_methods

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_QUALITY = {
    "needle 1 of 4, %": ("needle_1_of_4", 100, 1),
    "1 of 16, %": ("needle_1_of_16", 100, 1),
    "chain of 3, %": ("chain_of_3", 100, 1),
    "copied tokens, %": ("copy", 100, 1),
    "bits per byte": ("bits_per_byte", 1, 4),
    "change, %": ("bits_per_byte_change_percent", 1, 2),
    "decode change, %": ("decode_bits_per_byte_change_percent", 1, 2),
    "KL, millinats": ("kl", 1000, 2),
    "top-1 as dense, %": ("top1", 100, 1),
}
_COST = {
    "prefill density": ("prefill_density", 1, 3),
    "decode density": ("decode_density", 1, 3),
    "prefill recall": ("prefill_recall", 1, 4),
    "decode recall": ("decode_recall", 1, 4),
    "prefill, s": ("prefill_seconds", 1, 3),
    "deciding, %": ("prefill_selection_share", 100, 1),
    "decode step, ms": ("decode_step_seconds", 1000, 2),
    "deciding in decode, %": ("decode_selection_share", 100, 1),
}
_PANELS = [
    ("prefill_density", "needle_1_of_16"),
    ("prefill_density", "chain_of_3"),
    ("prefill_density", "bits_per_byte_change_percent"),
    ("prefill_density", "prefill_recall"),
    ("decode_density", "needle_1_of_16"),
    ("decode_density", "decode_kl"),
]
_MARKERS = "osD^vP*X"


def result_tables(cells: Iterable[Cell]) -> list[Table]:
    """Quality, with 95 % intervals in brackets, and cost."""
    kept = list(cells)
    return [_table("Quality", _QUALITY, kept), _table("Cost", _COST, kept)]


def methods_rows(document: dict[str, Any] | None) -> str:
    """The table of ``docs/methods.md``: each registered version at the longest length measured.

    ``document`` holds the results; None leaves the measured columns open.
    """
    cells: list[Cell] = document["cells"] if document else []
    rows = [
        "| Method | Version | What it does | When to use it | Prefill density | Decode density |"
        " Needle 1 of 16, % | Bits per byte, change in % | Prefill, s | At tokens |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, versions in list_sparse_methods().items():
        rows += [_row(get_sparse_method(name, version), cells) for version in versions]
    return "\n".join(rows)


def save_picture(path: Path, cells: Iterable[Cell]) -> None:
    """Draw quality against density, one colour a method, one marker a length.

    Raises:
        ImportError: matplotlib is not there.
    """
    check_picture()
    from matplotlib.figure import Figure

    kept = list(cells)
    figure = Figure(figsize=(17, 9), layout="constrained")
    axes = figure.subplots(2, 3).flat
    for panel, (across, up) in zip(axes, _PANELS, strict=True):
        _draw(panel, across, up, kept)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=110)


def check_picture() -> None:
    """Raise ImportError with what to do about it, if no picture can be drawn."""
    try:
        import matplotlib  # noqa: F401 - optional
    except ImportError:
        raise ImportError("A picture needs matplotlib: pip install 'sparseserve[plots]'.") from None


def _table(title: str, columns: dict[str, tuple[str, int, int]], cells: list[Cell]) -> Table:
    shown = {name: c for name, c in columns.items() if any(cell.get(c[0]) for cell in cells)}
    table = Table("Tokens", "Method", title=title)
    for name in shown:
        table.add_column(name, justify="right")
    for cell in cells:
        values = [_text(cell.get(key), *form) for key, *form in shown.values()]
        table.add_row(str(cell["length"]), escape(cell["label"]), *map(escape, values))
    return table


def _text(value: Any, factor: int, digits: int) -> str:  # noqa: ANN401 - a number or an estimate
    if value is None:
        return "-"
    if not isinstance(value, dict):
        return f"{value * factor:.{digits}f}"
    text = f"{value['value'] * factor:.{digits}f}"
    if value["low"] is None:
        return text
    low, high = (f"{value[end] * factor:.{digits}f}" for end in ("low", "high"))
    return f"{text} [{low}, {high}]"


def _row(cls: type[SparseAttentionMethod], cells: list[Cell]) -> str:
    mine = [
        cell
        for cell in cells
        if (cell["method"], cell["version"]) == (cls.registered_name, cls.registered_version)
        and _is_default(cls, cell)
    ]
    cell = max(mine, key=lambda c: c["length"], default=Cell())
    keys = ("needle_1_of_16", "bits_per_byte_change_percent")
    values = [
        f"`{cls.registered_name}`",
        cls.registered_version,
        cls.description(),
        _when(cls),
        *(_text(cell.get(key), 1, 3) for key in ("prefill_density", "decode_density")),
        *(_text(cell.get(key), *form) for key, form in zip(keys, ((100, 1), (1, 2)), strict=True)),
        _text(cell.get("prefill_seconds"), 1, 3),
        str(cell.get("length", "-")),
    ]
    return "| " + " | ".join(value.replace("|", "\\|") for value in values) + " |"


def _is_default(cls: type[SparseAttentionMethod], cell: Cell) -> bool:
    """Whether a cell shows the method's defaults; a break-even that was not met changes nothing."""
    defaults, knobs = cls().knobs.model_dump(mode="json"), dict(cell["knobs"])
    if cell.get("fallback") is None and "dense_below" in defaults:
        knobs["dense_below"] = defaults["dense_below"]
    return bool(knobs == defaults)


def _when(cls: type[SparseAttentionMethod]) -> str:
    """The paragraph of the class's docstring that begins with "Use"."""
    paragraphs = (" ".join(text.split()) for text in (cls.__doc__ or "").split("\n\n"))
    return next((text for text in paragraphs if text.startswith("Use ")), "-")


def _draw(panel: "Axes", across: str, up: str, cells: list[Cell]) -> None:
    methods = list(dict.fromkeys((cell["method"], cell["version"]) for cell in cells))
    lengths = sorted({cell["length"] for cell in cells})
    for cell in cells:
        height = cell.get(up)
        height = height["value"] if isinstance(height, dict) else height
        if height is None:
            continue
        color = methods.index((cell["method"], cell["version"]))
        panel.plot(
            cell[across],
            height,
            marker=_MARKERS[lengths.index(cell["length"]) % len(_MARKERS)],
            color=f"C{color}" if color < 10 else str(0.05 * (color - 9)),
            linestyle="none",
            label=f"{cell['label']}, {cell['length']}",
        )
    panel.set_xlabel(across.replace("_", " "))
    panel.set_ylabel(up.replace("_", " "))
    panel.grid(alpha=0.3)
