"""Where a task comes from: its parents, the experts it owns and shares, the versions in which it changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pathways.life.cost import own_names
from pathways.life.users import Expert, Users, experts_in, share_of
from pathways.model import STORE, Model, beside
from pathways.pathway import gate_names, head_names
from pathways.store import Store
from tasks.errors import UserError

NAMED = 3
"""Tasks that the text names for an expert; JSON has all."""


@dataclass(frozen=True)
class Part:
    """One expert of a task's pathway.

    Attributes:
        share: of the task's choices in that layer; None where none was noted.
        own: whether it was made for the task.
        others: the other tasks that can choose it.
    """

    expert: Expert
    share: float | None
    own: bool
    others: tuple[str, ...]


@dataclass(frozen=True)
class Moment:
    """A version in which something that the task runs on became another: `came`, `changed` or `gone`."""

    version: int
    message: str
    what: str


@dataclass(frozen=True)
class Lineage:
    """One task with all it comes from.

    Attributes:
        origin: `joint`, `added` or `copied`; `removed` where the model has the task no more.
        parents: their own lineages, without parts and moments.
        parts: the experts that its gate can choose.
        moments: oldest first.
    """

    task: str
    origin: str
    parents: tuple[Lineage, ...] = ()
    parts: tuple[Part, ...] = ()
    moments: tuple[Moment, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers; an expert as its name, `layer1/mlp/5`."""
        parts = [{**dataclasses.asdict(part), "expert": str(part.expert)} for part in self.parts]
        moments = [dataclasses.asdict(moment) for moment in self.moments]
        parents = [parent.to_json() for parent in self.parents]
        found: dict[str, Any] = {"task": self.task, "origin": self.origin, "parents": parents}
        return found | ({"experts": parts, "versions": moments} if self.parts or self.moments else {})


def lineage(model: Model, task: str) -> Lineage:
    """The lineage of a task. Versions newer than the one that is open are not looked at.

    Raises:
        UserError: no such task.
    """
    entry = model.entry(task)
    users, own = Users(model, without=task), set(experts_in(model, entry.pathway.owned))
    parts = tuple(
        Part(expert, share_of(entry, model, expert), expert in own, tuple(users.of(expert)))
        for expert in experts_in(model, model.gate(entry.pathway.gate).candidates)
    )
    ancestry = _ancestry(model, task, _names(model), ())
    return dataclasses.replace(ancestry, parts=parts, moments=tuple(moments(model, task)))


def _names(model: Model) -> dict[str, str]:
    """Names that tasks have or had -> the name they have now."""
    found = {was: entry.name for entry in model.entries() for was in entry.notes.get("was", ())}
    return found | {name: name for name in model.tasks}


def _ancestry(model: Model, task: str, names: Mapping[str, str], seen: tuple[str, ...]) -> Lineage:
    if task not in names or names[task] in seen:
        return Lineage(task, "removed")
    entry = model.entry(names[task])
    parents = (_ancestry(model, parent, names, (*seen, entry.name)) for parent in entry.pathway.parents)
    return Lineage(entry.name, entry.pathway.origin, tuple(parents))


def moments(model: Model, task: str) -> Iterator[Moment]:
    """The versions up to this one in which the task came, or something that its pathway runs on became another.

    Components are compared by digest, experts by that of their rows; no array is read.
    """
    store, last = Store.open(beside(model.path, STORE)), None
    for version in store.log():
        if model.version is not None and version.number > model.version:
            return
        then = _fingerprint(Model(model.path, store.at(version.number)), task)
        if then != last:
            what = "came" if last is None else "gone" if then is None else "changed"
            yield Moment(version.number, version.message, what)
        last = then


def _fingerprint(model: Model, task: str) -> dict[str, Any] | None:
    """Digests of all that the task runs on, but for the trunk; None where there is no such task."""
    if not model.view.has("manifest") or not model.has(task):
        return None
    try:
        entry = model.entry(task)
    except UserError:  # a version of an older format
        return None
    pathway = entry.pathway
    names = [*own_names(model, entry), f"norms/{pathway.norms}", *gate_names(pathway.gate, model.routed_layers)]
    names += head_names(task)
    found: dict[str, Any] = {n: e and e.digest for n, e in zip(names, model.view.find(names), strict=True)}
    for layer, kinds in zip(model.routed_layers, model.gate(pathway.gate).candidates, strict=True):
        for kind, index in kinds.items():
            for bank in model.view.names(f"banks/layer{layer}/{kind}/"):
                found[bank] = tuple(model.view.row_digests(bank, index))
    return found


def as_text(found: Lineage) -> str:
    """A tree: parents, experts by layer, versions."""
    lines = [f"{found.task} ({found.origin})"]
    branches = [("parents", list(_parent_lines(found))), ("experts", list(_expert_lines(found)))]
    branches.append(("versions", [f"{m.version}: {m.what} ({m.message})" for m in found.moments]))
    branches = [(title, inner) for title, inner in branches if inner]
    for i, (title, inner) in enumerate(branches):
        last = i == len(branches) - 1
        lines.append(f"{'└' if last else '├'}─ {title}")
        lines += [f"{' ' if last else '│'}    {line}" for line in inner]
    return "\n".join(lines)


def _parent_lines(found: Lineage) -> Iterator[str]:
    for i, parent in enumerate(found.parents):
        last = i == len(found.parents) - 1
        yield f"{'└' if last else '├'}─ {parent.task} ({parent.origin})"
        yield from (f"{' ' if last else '│'}  {line}" for line in _parent_lines(parent))


def _expert_lines(found: Lineage) -> Iterator[str]:
    for part in sorted(found.parts, key=lambda part: (part.expert.layer, not part.own, part.expert)):
        whose = "its own" if part.own else "shared"
        used = "" if part.share is None else f", {part.share:.0%} of its choices"
        more = f" and {len(part.others) - NAMED} more" if len(part.others) > NAMED else ""
        others = f", with {', '.join(part.others[:NAMED])}{more}" if part.others else ""
        yield f"{part.expert}: {whose}{used}{others}"
