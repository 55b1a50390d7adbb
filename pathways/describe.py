"""What is in a model, as tables and text: its tasks, its parameters, one task's pathway, its versions.

Only documents and the index of the store are read, no array.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from experts.compute import choose_backend
from pathways import report
from pathways.life.cost import marginal, operations
from pathways.model import RETRIEVAL, STORE, Model, beside
from pathways.pathway import encoder_names, gate_names, head_names, private
from pathways.store import Store
from pathways.store.compact import stored_bytes
from tasks.metrics import metric_names

if TYPE_CHECKING:
    from pathways.config import ModelConfig
    from pathways.submodel import TaskEntry

Pair = tuple[str, str]
SHADES = "·▁▂▃▄▅▆▇█"
"""How much of a task's choices an expert gets, against the one that gets most: a dot for none."""
STRIP = 64
"""Experts in one line of a drawing."""


class Sizes:
    """Parameters of every component, from the store's index."""

    def __init__(self, model: Model) -> None:
        self.model = model
        names = model.view.names()
        found = zip(names, model.view.find(names), strict=True)
        arrays = {name: entry for name, entry in found if entry is not None and entry.kind == "array"}
        self.arrays = {name: entry for name, entry in arrays.items() if name != RETRIEVAL}  # which computes nothing

    @property
    def total(self) -> int:
        return sum(math.prod(entry.shape) for entry in self.arrays.values())

    def named(self, *names: str) -> int:
        """Parameters of these components, those that exist."""
        return sum(math.prod(self.arrays[name].shape) for name in names if name in self.arrays)

    def under(self, *prefixes: str) -> int:
        """Parameters of the components whose names start with one of these. A task's own may not be asked for so."""
        return sum(math.prod(self.arrays[name].shape) for name in self.arrays if name.startswith(prefixes))

    @cached_property
    def expert(self) -> dict[tuple[int, str], int]:
        """(layer, kind) -> parameters of one expert."""
        found: dict[tuple[int, str], int] = {}
        for name, entry in self.arrays.items():
            parts = name.split("/")
            if parts[0] == "banks":
                key = (int(parts[1].removeprefix("layer")), parts[2])
                found[key] = found.get(key, 0) + math.prod(entry.shape[1:])
        return found

    def private(self, entry: TaskEntry) -> int:
        """Parameters that are the task's alone: head, own norms, gate and encoder rows, the experts made for it."""
        own = private(entry.name)
        count = self.named(*head_names(entry.name), *gate_names(own, self.model.routed_layers), f"norms/{own}")
        encoders = entry.pathway.encoders
        count += self.named(*encoder_names(encoders, self.model.copied(encoders)))
        for layer, owned in zip(self.model.routed_layers, entry.pathway.owned, strict=False):
            count += sum(self.expert.get((layer, kind), 0) * len(index) for kind, index in owned.items())
        return count

    def active(self, entry: TaskEntry) -> int:
        """Parameters that one row of the task passes through, at most: the largest `top_k` experts of each layer."""
        pathway, top_k = entry.pathway, self.model.config.model.gate.top_k
        mine = [*head_names(entry.name), *gate_names(pathway.gate, self.model.routed_layers), f"norms/{pathway.norms}"]
        count = self.under("trunk/") + self.named(*mine)
        count += self.under(*(f"encoders/{stream}/" for stream in pathway.streams)) if pathway.streams else 0
        for layer, candidates in zip(self.model.routed_layers, self.model.gate(pathway.gate).candidates, strict=True):
            sizes = [self.expert.get((layer, kind), 0) for kind, index in candidates.items() for _ in index]
            count += sum(sorted(sizes, reverse=True)[:top_k])
        return count


def task_rows(model: Model) -> tuple[list[report.Column], list[list[Any]]]:
    """One row per task, for `report.table`."""
    columns = [
        report.Column("task"),
        report.Column("kind"),
        report.Column("inputs"),
        report.Column("rows", "integer"),
        report.Column("metric"),
        report.Column("value", "number"),
        report.Column("origin"),
        report.Column("experts", "integer"),
        report.Column("private", "count"),
        report.Column("operations", "count"),
    ]
    sizes, rows = Sizes(model), []
    for entry in model.entries():
        name = entry.name
        metric, value = chief_metric(model, name)
        task = entry.fitted.task
        rows.append(
            [
                name,
                task.target.kind,
                _kinds(entry),
                entry.fitted.train_rows,
                metric,
                value,
                entry.pathway.origin,
                experts_used(model, entry),
                sizes.private(entry),
                operations(model, entry),
            ]
        )
    return columns, rows


def compact(rows: list[list[Any]]) -> tuple[list[report.Column], list[list[Any]]]:
    """The same for a terminal of 80 columns: metric and value as one, the origin only where some task was added."""
    added = any(row[6] != "joint" for row in rows)
    columns = [
        report.Column("task", "word"),
        report.Column("kind", "word"),
        report.Column("inputs"),
        report.Column("rows", "integer"),
        report.Column("score"),
        *[report.Column("origin", "word")] * added,
        report.Column("experts", "integer"),
        report.Column("private", "count"),
    ]
    scores = [f"{row[4]} {report.number(row[5])}" if row[4] else None for row in rows]
    shown = [[*row[:4], score, *[row[6]] * added, *row[7:9]] for row, score in zip(rows, scores, strict=True)]
    return columns, shown


def chief_metric(model: Model, name: str) -> tuple[str | None, float | None]:
    """The figure that was noted when the task came: its card's, else the first one of its validation rows."""
    card = card_of(model, name)
    if card is not None:
        return card.metric, card.value
    entry = model.entry(name)
    noted: Mapping[str, float] = entry.notes.get("valid", {})
    found = next((metric for metric in metric_names(entry.fitted) if metric in noted), None)
    return (None, None) if found is None else (found, noted[found])


def card_of(model: Model, name: str) -> report.Card | None:
    """The card of an added task; None for one that was trained jointly."""
    document = f"cards/{name}"
    return report.Card.from_json(json.dumps(model.view.document(document))) if model.view.has(document) else None


def shares(entry: TaskEntry) -> list[dict[str, dict[int, float]]]:
    """Per routed layer, kind -> expert -> its share of the task's choices, as noted when the task came."""
    usage = (entry.notes.get("profile") or {}).get("usage", [])
    return [{kind: {int(i): share for i, share in of.items()} for kind, of in layer.items()} for layer in usage]


def experts_used(model: Model, entry: TaskEntry) -> int:
    """Experts, of all layers, that get at least 1% of the task's choices; its candidates where nothing was noted."""
    noted = shares(entry)
    if noted:
        return sum(share >= 0.01 for layer in noted for of in layer.values() for share in of.values())
    return sum(len(index) for layer in model.gate(entry.pathway.gate).candidates for index in layer.values())


def model_facts(model: Model) -> list[Pair]:
    """What `pathways show MODEL` says first."""
    config, sizes = model.config.model, Sizes(model)
    entries = model.entries()
    active = [sizes.active(entry) for entry in entries]
    own = sum(sizes.private(entry) for entry in entries)
    most, least = max(active, default=0), min(active, default=0)
    span = report.count(most) if most == least else f"{report.count(least)} to {report.count(most)}, by task"
    facts = [
        ("version", str(model.version)),
        ("tasks", report.integer(len(entries))),
        ("parameters", f"{report.count(sizes.total)} in total"),
        ("active per row", f"{span} (top {config.gate.top_k} of each layer's experts)"),
        ("private to tasks", report.count(own)),
        ("shared", report.count(sizes.total - own)),
        ("layers", _layers(config, len(model.routed_layers))),
        ("gate", f"{config.gate.kind}, {config.gate.scope}, one choice per {config.gate.unit}"),
        ("experts by", f"{_backend(config)} on {jax.default_backend()} in {config.dtype}"),
    ]
    for layer, banks in zip(model.routed_layers, model.bank_sizes, strict=True):
        facts.append((f"layer {layer}", ", ".join(f"{report.integer(n)} {kind}" for kind, n in banks.items())))
    return [*facts, ("store", report.size(stored_bytes(beside(model.path, STORE))))]


def _layers(config: ModelConfig, routed: int) -> str:
    if config.trunk == "conv":
        return f"{config.layers} of {config.width} channels, with strides {', '.join(map(str, config.strides))}"
    return f"{config.layers} of width {config.width}, {routed} of them with experts"


def _backend(config: ModelConfig) -> str:
    return "blocks of images" if config.trunk == "conv" else choose_backend(jnp.dtype(config.dtype))


def task_facts(model: Model, name: str) -> list[Pair]:
    """What `pathways show MODEL TASK` says first."""
    entry, sizes = model.entry(name), Sizes(model)
    task, fitted, pathway = entry.fitted.task, entry.fitted, entry.pathway
    metric, value = chief_metric(model, name)
    used_by = sum(line.gate == pathway.gate for line in model.catalogue.lines())
    cost = marginal(model, name)
    facts = [
        ("kind", str(task.target.kind)),
        ("target", ", ".join(task.target.columns)),
        ("inputs", ", ".join(f"{column.column} ({column.kind})" for column in task.inputs)),
        ("classes", _listed(fitted.classes) if fitted.classes else "none: numbers"),
        ("rows", f"{fitted.train_rows:,} train, {fitted.valid_rows:,} valid, {fitted.test_rows:,} test"),
        ("data", task.train),
        ("loss, metrics", ", ".join([str(task.loss), *metric_names(fitted)])),
        (metric or "metric", report.show(value, "number")),
        ("active per row", report.count(sizes.active(entry))),
        ("private", f"{report.count(cost.parameters)} parameters, {report.size(cost.bytes)} on disk"),
        ("operations per row", report.count(cost.operations)),
        ("encoders", pathway.encoders),
        ("norms", pathway.norms),
        ("gate", f"{pathway.gate}, of {used_by} task" + "s" * (used_by != 1)),
        ("origin", pathway.origin + (f", {entry.notes['made']}" if "made" in entry.notes else "")),
    ]
    if pathway.parents:
        facts.append(("parents", ", ".join(pathway.parents)))
    owned = sum(len(index) for layer in pathway.owned for index in layer.values())
    return [*facts, ("own experts", str(owned))]


def drawing(model: Model, name: str) -> str:
    """A task's pathway in text: per layer and kind its candidates, each a bar of its share of the task's choices."""
    entry = model.entry(name)
    noted, owned = shares(entry), entry.pathway.owned
    lines = [f"{', '.join(entry.pathway.streams)} encoder"]
    at = dict(zip(model.routed_layers, range(len(model.routed_layers)), strict=True))
    for layer in range(model.config.model.layers):
        lines.append("  │")
        if layer not in at:
            lines.append(f"layer {layer:<3} dense")
            continue
        place = at[layer]
        mine = owned[place] if place < len(owned) else {}
        of = noted[place] if place < len(noted) else {}
        for i, (kind, index) in enumerate(model.gate(entry.pathway.gate).candidates[place].items()):
            head = f"layer {layer:<3}" if i == 0 else " " * 9
            lines += _layer_lines(head, kind, index, of.get(kind, {}), set(mine.get(kind, ())))
    return "\n".join([*lines, "  │", f"head      {entry.fitted.num_outputs} outputs"])


def _layer_lines(head: str, kind: str, index: Sequence[int], of: Mapping[int, float], mine: set[int]) -> Iterator[str]:
    most = max(of.values(), default=0.0)
    for start in range(0, len(index), STRIP):
        part = index[start : start + STRIP]
        bars = "".join(_shade(of.get(i, 0.0), most) for i in part)
        label = f"{head} {kind} {_ranges(part)}" if start == 0 else f"{' ' * 9} {' ' * len(kind)} {_ranges(part)}"
        yield f"{label}  {bars}" if of else label
    used = sorted((i for i in index if of.get(i, 0.0) >= 0.01), key=lambda i: -of[i])[:6]
    notes = [f"most used: {', '.join(f'{i} ({report.percent(of[i])})' for i in used)}"] if used else []
    notes += [f"its own: {_ranges(sorted(mine))}"] if mine else []
    if notes:
        yield " " * 10 + "; ".join(notes)


def _shade(share: float, most: float) -> str:
    if share <= 0 or most <= 0:
        return SHADES[0]
    return SHADES[max(1, math.ceil((len(SHADES) - 1) * share / most))]


def _ranges(numbers: Iterable[int]) -> str:
    """1, 2, 3, 7 as `1-3, 7`."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


def _listed(names: Sequence[str], most: int = 12) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)}: {', '.join(names[:most])}{more}"


def _kinds(entry: TaskEntry) -> str:
    counts: dict[str, int] = {}
    for column in entry.fitted.task.inputs:
        counts[str(column.kind)] = counts.get(str(column.kind), 0) + 1
    return ", ".join(kind if n == 1 else f"{n} {kind}" for kind, n in counts.items())


def log_rows(model: Model) -> tuple[list[report.Column], list[list[Any]]]:
    """One row per version, oldest first, for `report.table`."""
    columns = [
        report.Column("version", "integer"),
        report.Column("time (UTC)"),
        report.Column("from", "integer"),
        report.Column("name"),
        report.Column("message"),
        report.Column("changes"),
        report.Column("bytes", "bytes"),
    ]
    rows = []
    store = Store.open(beside(model.path, STORE))
    names = store.pins().items()
    for version in store.log():
        counts = version.changes.get("counts", {})
        done = [f"{counts[sort]} {sort}" for sort in ("written", "appended", "removed") if counts.get(sort)]
        time, size = version.time.strftime("%Y-%m-%d %H:%M"), version.changes.get("bytes", 0)
        pins = ", ".join(name for name, number in names if number == version.number) or None
        rows.append([version.number, time, version.parent, pins, version.message, ", ".join(done), size])
    return columns, rows
