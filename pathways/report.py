"""What the commands print: numbers, tables in three forms, and the card of a task."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from tasks.errors import UserError
from tasks.spec import LOWER_IS_BETTER

if TYPE_CHECKING:
    from rich.console import Console

Kind = Literal["text", "word", "integer", "count", "number", "percent", "seconds", "bytes"]
Format = Literal["table", "csv", "json"]


def number(value: float, digits: int = 3) -> str:
    """Significant digits, no exponent between 0.0001 and a million: 0.0123, 98.8, 1.23e-05."""
    value = float(value)
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits - 1}e}")
    if not 1e-4 <= abs(rounded) < 1e6:
        return f"{rounded:.{digits - 1}e}"
    decimals = max(digits - 1 - math.floor(math.log10(abs(rounded))), 0)
    return f"{rounded:,.{decimals}f}"


def count(value: float) -> str:
    """12,345,678 -> 12.3M; whole below a thousand."""
    return _scaled(value, 1000.0, ("", "K", "M", "B", "T"))


def size(value: float) -> str:
    """Bytes: 1,234,567 -> 1.23 MB."""
    return _scaled(value, 1000.0, (" B", " kB", " MB", " GB", " TB"))


def _scaled(value: float, base: float, units: Sequence[str]) -> str:
    value, unit = float(value), 0
    while abs(float(f"{value:.3g}")) >= base and unit < len(units) - 1:
        value, unit = value / base, unit + 1
    text = number(value) if unit or value % 1 else f"{value:.0f}"
    return text + units[unit]


def percent(value: float) -> str:
    """A share of one as percent, one decimal: 0.1234 -> 12.3%."""
    return f"{100 * float(value):.1f}%"


def duration(seconds: float) -> str:
    """0.25 s, 12.3 s, 2 min 05 s, 3 h 07 min, 2 d 04 h."""
    if seconds < 60 and float(f"{seconds:.3g}") < 60:
        return f"{number(seconds)} s"
    whole = round(seconds)
    for unit, name, small, small_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= unit:
            return f"{whole // unit} {name} {whole % unit // small:02d} {small_name}"
    return f"{whole} s"


def integer(value: float) -> str:
    return f"{int(value):,}"


_FORMATS: dict[str, Callable[[Any], str]] = {
    "text": str,
    "word": str,
    "integer": integer,
    "count": count,
    "number": number,
    "percent": percent,
    "seconds": duration,
    "bytes": size,
}


@dataclass(frozen=True)
class Column:
    """A column of a table: its header and how its values are shown. csv and json get the values as they are.

    A `word` is text that is not broken where the terminal is narrow.
    """

    name: str
    kind: Kind = "text"


def table(
    title: str,
    columns: Sequence[Column | str],
    rows: Iterable[Sequence[Any]],
    *,
    format: Format | str = "table",
    console: Console | None = None,
) -> None:
    """Prints a table on a terminal, or its values as csv or json.

    Args:
        title: shown above the terminal's table only.
        columns: a bare string is a column of text.
        rows: one value per column; `None` is shown as a dash, is empty in csv and null in json.

    Raises:
        UserError: an unknown format.
    """
    shown = [Column(column) if isinstance(column, str) else column for column in columns]
    values = [list(row) for row in rows]
    names = [column.name for column in shown]
    if format not in get_args(Format):
        raise UserError("unknown output format", where="--format", expected="table, csv or json", got=format)
    out = console or _console()
    if format == "table":
        _render(title, shown, values, out)
    else:
        text = to_csv(names, values) if format == "csv" else to_json(names, values)
        out.file.write(text)


def to_csv(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([[_plain(value) for value in row] for row in rows])
    return out.getvalue()


def to_json(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A list of objects; numbers that are not finite become null."""
    objects = [{name: _finite(_plain(value)) for name, value in zip(names, row, strict=True)} for row in rows]
    return json.dumps(objects, indent=2, ensure_ascii=False, default=str) + "\n"


def arrow_table(title: str, data: Any, kinds: dict[str, Kind] | None = None, **options: Any) -> None:
    """Prints a `pyarrow.Table`; columns that are not in `kinds` are shown by their type."""
    import pyarrow as pa

    kinds = kinds or {}
    columns = []
    for name, dtype in zip(data.schema.names, data.schema.types, strict=True):
        guess: Kind = "integer" if pa.types.is_integer(dtype) else "text"
        guess = "number" if pa.types.is_floating(dtype) or pa.types.is_decimal(dtype) else guess
        columns.append(Column(name, kinds.get(name, guess)))
    lists = [column.to_pylist() for column in data.columns]
    table(title, columns, list(zip(*lists, strict=True)), **options)


def _render(title: str, columns: list[Column], rows: list[list[Any]], console: Console) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    grid = Table(title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        # Text gives way where the terminal is narrow; a number cut in two would read as another.
        justify = "left" if column.kind in ("text", "word") else "right"
        grid.add_column(Text(column.name), justify=justify, overflow="fold", no_wrap=column.kind != "text")
    for row in rows:
        grid.add_row(*(Text(show(value, column.kind)) for value, column in zip(row, columns, strict=True)))
    console.print(grid)


def show(value: Any, kind: Kind = "text") -> str:
    """A value as a table shows it."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else ""
    if kind == "text" and isinstance(value, float):
        return number(value)
    return _FORMATS[kind](value)


def _plain(value: Any) -> Any:
    """numpy scalars to Python's own."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _console() -> Console:
    from rich.console import Console

    return Console()


@dataclass(frozen=True)
class Reused:
    """An expert that a new task took over, and the tasks that already used it."""

    layer: int
    kind: str
    expert: int
    from_tasks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Card:
    """What adding a task came to.

    Attributes:
        task, metric, value: the score on the task's test rows.
        baselines: name -> the same metric on the same rows.
        seconds: wall-clock time of the whole addition.
        trainable_parameters: that were trained; new_parameters: that the model grew by.
        reused: experts taken over from others.
        notes: anything else worth a sentence.
    """

    task: str
    metric: str
    value: float
    baselines: dict[str, float]
    seconds: float
    trainable_parameters: int
    new_parameters: int
    reused: tuple[Reused, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def to_json(self) -> str:
        content = asdict(self)
        content["value"] = _finite(self.value)
        content["baselines"] = {name: _finite(value) for name, value in self.baselines.items()}
        return json.dumps({"format": 1, **content}, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Card:
        """Raises UserError for text that is not a card, or one of a newer format."""
        try:
            content = json.loads(text)
            version = content.pop("format")
            if version != 1:
                raise UserError("the card has a newer format", expected="format 1", got=f"format {version}")
            reused = (Reused(**{**one, "from_tasks": tuple(one["from_tasks"])}) for one in content.pop("reused"))
            nan = float("nan")
            content["value"] = nan if content["value"] is None else content["value"]
            content["baselines"] = {k: nan if v is None else v for k, v in content["baselines"].items()}
            return cls(**{**content, "notes": tuple(content["notes"])}, reused=tuple(reused))
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise UserError("this is not the card of a task", got=str(error)) from None

    @property
    def _scores(self) -> list[tuple[str, str, str]]:
        """(name, value, how it compares) of this model and of each baseline."""
        sign = -1 if self.metric in LOWER_IS_BETTER else 1
        rows = [("this model", number(self.value), "")]
        for name, value in self.baselines.items():
            gain = sign * (self.value - value)
            verdict = "" if math.isnan(gain) else "equal" if gain == 0 else "better" if gain > 0 else "worse"
            words = f"this model is {verdict} by {number(abs(gain))}" if gain else f"this model is {verdict}"
            rows.append((name, number(value), words if verdict else ""))
        return rows

    @property
    def _facts(self) -> list[tuple[str, str]]:
        return [
            ("time", duration(self.seconds)),
            ("trained parameters", count(self.trainable_parameters)),
            ("new parameters", count(self.new_parameters)),
        ]

    @property
    def _reuse(self) -> list[tuple[str, str, str]]:
        """(layer, expert, tasks it comes from)."""
        reused = sorted(self.reused, key=lambda one: (one.layer, one.kind, one.expert))
        return [(str(one.layer), f"{one.kind} {one.expert}", ", ".join(one.from_tasks) or "–") for one in reused]

    def render(self, console: Console | None = None) -> None:
        """Prints the card as a panel."""
        from rich.console import Group
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        scores = Table.grid(padding=(0, 3))
        for i, (name, value, words) in enumerate(self._scores):
            style = "bold" if i == 0 else ""
            scores.add_row(Text(name, style), Text(value, style), Text(words, "dim"))
        facts = Table.grid(padding=(0, 3))
        for name, value in self._facts:
            facts.add_row(Text(name), Text(value))
        parts: list[Any] = [Text(self.metric, "dim"), scores, Text(), facts]
        if self.reused:
            reuse = Table.grid(padding=(0, 3))
            for layer, expert, names in self._reuse:
                reuse.add_row(Text(f"layer {layer}"), Text(expert), Text(names))
            parts += [Text(), Text("experts reused, and the tasks they come from", "dim"), reuse]
        if self.notes:
            parts += [Text(), *(Text(f"• {note}") for note in self.notes)]
        panel = Panel(
            Group(*parts), title=Text(f" {self.task} ", "bold"), title_align="left", expand=False, padding=(1, 2)
        )
        (console or _console()).print(panel)

    def markdown(self) -> str:
        """The card as Markdown."""
        lines = [f"## {self.task}", "", f"| {self.metric} | value | |", "|---|---:|---|"]
        lines += [f"| {_cell(name)} | {value} | {words} |" for name, value, words in self._scores]
        lines += ["", *(f"- {name}: {value}" for name, value in self._facts)]
        if self.reused:
            lines += ["", "| layer | reused expert | used by |", "|---:|---|---|"]
            lines += [f"| {layer} | {expert} | {_cell(names)} |" for layer, expert, names in self._reuse]
        return "\n".join([*lines, *([""] if self.notes else []), *(f"- {note}" for note in self.notes)]) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
