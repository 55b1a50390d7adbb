"""The catalogue: which tasks a model has, in the order they came, and the parts that each runs on.

It stands in pages of `PAGE` tasks, documents `catalogue/<page>`, so that a task that comes or goes rewrites one
page, not a list of all. The manifest holds how many tasks there are, the number that the next one gets, and how
many tasks are in each group that several share. A model from before there was a catalogue has the names of all
tasks in its manifest instead; it is read as it is, and its next commit gives it a catalogue.

| document | what it says |
|---|---|
| `catalogue/<page>` | number -> `[task, norms, gate, encoders]`; an empty name is the task's own, `own/<task>` |
| `manifest`, `catalogue` | `count`, `next`, `groups`: `[norms, gate, encoders, tasks]` of each shared group |
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pathways.pathway import Pathway, pathway_from_json, private
from pathways.store.view import View

PAGE = 128
"""Tasks of one page: about 4 KB."""
PREFIX = "catalogue/"

Document = dict[str, Any]


@dataclass(frozen=True)
class Listed:
    """One line: a task, and the names of the norms, the gate and the encoders it runs on."""

    number: int
    task: str
    norms: str
    gate: str
    encoders: str

    @property
    def group(self) -> tuple[str, str]:
        """Tasks with the same norms and gate run in one network."""
        return self.norms, self.gate

    @property
    def shares(self) -> bool:
        """Whether its group can hold other tasks, too."""
        return private(self.task) not in (self.norms, self.gate)

    def to_json(self) -> list[str]:
        own = private(self.task)
        return [self.task, *("" if name == own else name for name in (self.norms, self.gate, self.encoders))]


def listed(number: int, pathway: Pathway) -> Listed:
    """The line of a task."""
    return Listed(number, pathway.task, pathway.norms, pathway.gate, pathway.encoders)


def page_name(number: int) -> str:
    """The page on which a task's line stands, by the task's number."""
    return f"{PREFIX}{number // PAGE:06d}"


class Catalogue:
    """The catalogue of one version.

    Args:
        manifest: of that version.
    """

    def __init__(self, view: View, manifest: Mapping[str, Any]) -> None:
        self._view, self._manifest = view, manifest
        self._pages: dict[str, list[Listed]] = {}

    @property
    def count(self) -> int:
        """How many tasks there are."""
        return self._head["count"] if self._paged else len(self._manifest["tasks"])

    @property
    def next(self) -> int:
        """The number that the next task gets."""
        return self._head["next"] if self._paged else len(self._manifest["tasks"])

    @property
    def shared(self) -> Counter[tuple[str, str, str]]:
        """Norms, gate and encoders that tasks share -> how many do, in the order they came."""
        if not self._paged:
            return group_counts(self.lines())
        return Counter({(norms, gate, encoders): count for norms, gate, encoders, count in self._head["groups"]})

    def lines(self) -> list[Listed]:
        """Every task, in the order they came."""
        if not self._paged:
            return self._from_tasks()
        self._load(self._view.names(PREFIX))
        return [line for name in sorted(self._pages) for line in self._pages[name]]

    def first(self) -> Iterator[Listed]:
        """The same, a page read when it is needed."""
        if not self._paged:
            yield from self._from_tasks()
            return
        for number in range(0, self.next, PAGE):
            yield from self.page(number)

    def page(self, number: int) -> list[Listed]:
        """The lines of the page of task `number`."""
        name = page_name(number)
        if name not in self._pages:
            self._load([name] if self._view.has(name) else [])
        return self._pages.get(name, [])

    def sample(self, rng: np.random.Generator, pages: int) -> list[Listed]:
        """The lines of at most so many pages, drawn by `rng`; all tasks where there are no more pages."""
        if not self._paged:
            return self._from_tasks()
        numbers = range(0, self.next, PAGE)
        chosen = rng.choice(len(numbers), pages, replace=False) if len(numbers) > pages else range(len(numbers))
        return [line for i in sorted(int(i) for i in chosen) for line in self.page(numbers[i])]

    def find(self, task: str) -> Listed | None:
        """The line of a task."""
        return next((line for line in self.lines() if line.task == task), None)

    def changed(
        self, add: Sequence[Pathway] = (), remove: Iterable[str] = (), replace: Mapping[str, Pathway] | None = None
    ) -> tuple[dict[str, Document], Document]:
        """The pages to write for these changes, and what the manifest says of the catalogue from then on.

        Args:
            replace: task -> what stands in its place, under its number.
        """
        gone, other = set(remove), dict(replace or {})
        old = self.lines() if gone or other or not self._paged else self.page(self.next)
        new = [listed(self.next + i, pathway) for i, pathway in enumerate(add)]
        left = [line for line in old if line.task in gone or line.task in other]
        put = [*new, *(listed(line.number, other[line.task]) for line in left if line.task in other)]
        lines = [*(line for line in old if line not in left), *put]
        touched = {page_name(line.number) for line in ([*left, *put] if self._paged else lines)}
        groups = self.shared
        groups.update(group_counts(put))
        groups.subtract(group_counts(left))
        head = {
            "count": self.count + len(put) - len(left),
            "next": self.next + len(new),
            "groups": [[*group, count] for group, count in groups.items() if count > 0],
        }
        pages = {name: document(line for line in lines if page_name(line.number) == name) for name in sorted(touched)}
        return pages, head

    @property
    def _paged(self) -> bool:
        return "catalogue" in self._manifest

    @property
    def _head(self) -> Document:
        return self._manifest["catalogue"]

    def _load(self, names: Iterable[str]) -> None:
        names = [name for name in names if name not in self._pages]
        for name, page in zip(names, self._view.documents(names), strict=True):
            self._pages[name] = read_page(page)

    def _from_tasks(self) -> list[Listed]:
        """Of a model without a catalogue: from the documents of all tasks."""
        names = self._manifest["tasks"]
        found = self._view.documents(f"tasks/{name}" for name in names)
        return [listed(number, pathway_from_json(task["pathway"])) for number, task in enumerate(found)]


def read_page(page: Mapping[str, Sequence[str]]) -> list[Listed]:
    """The lines of a page's document, in order."""
    found = []
    for number, (task, *names) in sorted(page.items(), key=lambda item: int(item[0])):
        norms, gate, encoders = (name or private(task) for name in names)
        found.append(Listed(int(number), task, norms, gate, encoders))
    return found


def document(lines: Iterable[Listed]) -> Document:
    """The document of a page; the inverse of `read_page`."""
    return {str(line.number): line.to_json() for line in sorted(lines, key=lambda line: line.number)}


def group_counts(lines: Iterable[Listed]) -> Counter[tuple[str, str, str]]:
    """How many of these tasks are in each group that can be shared."""
    return Counter((line.norms, line.gate, line.encoders) for line in lines if line.shares)


def new_catalogue(pathways: Sequence[Pathway]) -> tuple[dict[str, Document], Document]:
    """Pages and manifest's part of a model with these tasks."""
    lines = [listed(number, pathway) for number, pathway in enumerate(pathways)]
    groups = [[*group, count] for group, count in group_counts(lines).items()]
    head = {"count": len(lines), "next": len(lines), "groups": groups}
    starts = range(0, len(lines), PAGE)
    return {page_name(start): document(lines[start : start + PAGE]) for start in starts}, head
