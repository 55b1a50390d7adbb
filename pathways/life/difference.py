"""What is different between two versions of a model, or of one task in it; from digests, without reading an array."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pathways.describe import chief_metric
from pathways.life.cost import array_bytes, own_names
from pathways.life.users import Expert, experts_in
from pathways.model import Model
from pathways.store.records import Entry
from tasks.check import unknown


@dataclass(frozen=True)
class Component:
    """A name that is `added`, `removed` or `changed`, and the bytes of it that are; None for a document or blob."""

    name: str
    what: str
    bytes: int | None


@dataclass(frozen=True)
class Difference:
    """From one version to another.

    Attributes:
        tasks: task -> `added`, `removed` or `changed`.
        experts: expert -> `added` or `changed`; one that a removed task left is changed, to zero.
        metrics: task -> (metric, before, after) as noted on its card, where the two are not the same.
    """

    tasks: dict[str, str]
    components: tuple[Component, ...]
    experts: dict[Expert, str]
    metrics: dict[str, tuple[str, float | None, float | None]]

    def to_json(self) -> dict[str, Any]:
        return {
            "tasks": self.tasks,
            "components": [dataclasses.asdict(component) for component in self.components],
            "experts": {str(expert): what for expert, what in self.experts.items()},
            "metrics": {task: list(found) for task, found in self.metrics.items()},
        }


def diff(old: Model, new: Model, task: str | None = None) -> Difference:
    """What changed from one version to another.

    Args:
        task: only what this task runs on.

    Raises:
        UserError: a task that neither version has.
    """
    if task is not None and not (old.has(task) or new.has(task)):
        raise unknown("task", task, sorted({*old.tasks, *new.tasks}), where=new.path)
    names = sorted({*old.view.names(), *new.view.names()} if task is None else _names_of(task, old, new))
    mine = None if task is None else {one for m in (old, new) if m.has(task) for one in _experts(m, task)}
    components, experts = [], {}
    for name, was, now in zip(names, old.view.find(names), new.view.find(names), strict=True):
        if was == now or (was is not None and now is not None and was.digest == now.digest):
            continue
        if was is not None and now is not None and was.paged != now.paged and _same_rows(old, new, name, was, now):
            continue
        rows = _rows(old, new, name, was, now) if name.startswith("banks/") else {}
        rows = {expert: what for expert, what in rows.items() if mine is None or expert in mine}
        if mine is not None and name.startswith("banks/") and not rows:
            continue
        components.append(Component(name, _what(was, now), _bytes(was, now, len(rows))))
        for expert, what in rows.items():
            experts[expert] = "added" if "added" in (what, experts.get(expert)) else what
    tasks = {name: _what(*(True if m.has(name) else None for m in (old, new))) for name in _tasks(components)}
    metrics = {name: found for name in tasks if (found := _metric(old, new, name))[1] != found[2]}
    return Difference(tasks, tuple(components), dict(sorted(experts.items())), metrics)


def _what(was: object | None, now: object | None) -> str:
    return "added" if was is None else "removed" if now is None else "changed"


def _tasks(components: Iterable[Component]) -> list[str]:
    """The tasks whose own components are among these."""
    found = (_task_of(component.name) for component in components)
    return sorted({task for task in found if task is not None})


def _task_of(name: str) -> str | None:
    first, _, rest = name.partition("/")
    if first in ("tasks", "cards"):
        return rest
    if first == "heads":
        return rest.rpartition("/")[0]
    return None


def _names_of(task: str, old: Model, new: Model) -> set[str]:
    found = set[str]()
    for model in (old, new):
        if model.has(task):
            entry = model.entry(task)
            found |= {*own_names(model, entry), f"norms/{entry.pathway.norms}"}
            found |= set(model.view.names("banks/"))
    return found


def _experts(model: Model, task: str) -> list[Expert]:
    return experts_in(model, model.gate(model.entry(task).pathway.gate).candidates)


def _rows(old: Model, new: Model, name: str, was: Entry | None, now: Entry | None) -> dict[Expert, str]:
    """The rows of a bank that differ."""
    before = [] if was is None else old.view.row_digests(name)
    after = [] if now is None else new.view.row_digests(name)
    layer, kind = int(name.split("/")[1].removeprefix("layer")), name.split("/")[2]
    changed = {Expert(layer, kind, i): "changed" for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b}
    new_rows = {Expert(layer, kind, i): "added" for i in range(len(before), len(after))}
    return changed | new_rows | {Expert(layer, kind, i): "removed" for i in range(len(after), len(before))}


def _same_rows(old: Model, new: Model, name: str, was: Entry, now: Entry) -> bool:
    """Whether only the store's format changed, from which the digest of an array follows, but not those of its rows."""
    alike = (was.dtype, was.shape, was.row_chunked) == (now.dtype, now.shape, now.row_chunked)
    return alike and old.view.row_digests(name) == new.view.row_digests(name)


def _bytes(was: Entry | None, now: Entry | None, rows: int) -> int | None:
    entry = now or was
    if entry is None or entry.kind != "array":
        return None
    return rows * entry.chunk_bytes if entry.row_chunked else array_bytes(entry)


def _metric(old: Model, new: Model, task: str) -> tuple[str, float | None, float | None]:
    found = [chief_metric(model, task) if model.has(task) else (None, None) for model in (old, new)]
    return found[1][0] or found[0][0] or "", found[0][1], found[1][1]
