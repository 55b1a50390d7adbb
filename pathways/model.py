"""The model on disk and what can be asked of it.

A model is a folder (or a `gs://`, `s3://` URL): `store/` holds every component in versions, `statistics/` the routing
tables, and a training run leaves its logs beside them. Opening reads a few documents; arrays are read when a sub-model
needs them, and only those it needs.
"""

from __future__ import annotations

import dataclasses
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from pathways.assemble import Layout, Part, plan_network
from pathways.catalogue import Catalogue
from pathways.config import SECTIONS, Config
from pathways.pathway import BASE, EncoderCopy, GateSpec, encoder_copy_from_json, gate_from_json, pathway_from_json
from pathways.store import Changes, Store
from pathways.store.view import View
from pathways.submodel import SubModel, TaskEntry, read_submodel
from tasks.check import unknown
from tasks.errors import UserError
from tasks.fitted import FittedTask
from tasks.tokenizer import Tokenizer

STORE, STATISTICS = "store", "statistics"
TRAINED = "trained"
"""The document with what joint training was given, by which a run that is started again is known."""
RETRIEVAL = "retrieval/embedding"
"""The array by which similar tasks are found; see `pathways.retrieval`."""
FORMAT = 2
"""Version of the documents and of what the components mean; the store has one of its own."""
KEPT = 4
"""Sub-models that a model keeps, the last used: each holds its parameters on the device."""


def beside(path: str | os.PathLike[str], name: str) -> str:
    """A place in a model's folder or URL."""
    return f"{os.fspath(path).rstrip('/')}/{name}"


def row_chunked(name: str) -> bool:
    """Banks are stored one chunk per expert, the index of tasks one per task; everything else whole."""
    return name.startswith("banks/") or name == RETRIEVAL


class Model:
    """One version of a model.

    Attributes:
        path: its folder or URL.
        view: the state that is read: an opened store, or the uncommitted state inside a commit's check.
    """

    def __init__(self, path: str | os.PathLike[str], view: View) -> None:
        self.path, self.view = os.fspath(path), view
        self._entries: dict[str, TaskEntry] = {}
        self._gates: dict[str, GateSpec] = {}
        self._copied: dict[str, EncoderCopy] = {BASE: {}}
        self._submodels: OrderedDict[tuple[str, ...], SubModel] = OrderedDict()

    @classmethod
    def open(cls, path: str | os.PathLike[str], version: int | str | None = None) -> Model:
        """Opens the newest version, or an older one by its number or name, for reading.

        Raises:
            UserError: there is no model there, it is of a newer format, or it has no such version.
        """
        return cls(path, Store.open(beside(path, STORE), version))

    @property
    def version(self) -> int | None:
        """Its number; None inside a commit."""
        return getattr(self.view, "version", None)

    @cached_property
    def manifest(self) -> dict[str, Any]:
        found = self.view.document("manifest")
        if found.get("format", 0) > FORMAT:
            raise UserError(
                "This model was written by a newer version of pathways.",
                where=self.path,
                expected=f"model format {FORMAT} or older",
                got=f"model format {found['format']}",
                fix="pip install -U pathways-moe",
            )
        if found.get("format", 0) < FORMAT:
            raise UserError(
                "This model was written by a version of pathways from before the first release.",
                where=self.path,
                expected=f"model format {FORMAT}",
                got=f"model format {found.get('format', 0)}",
                fix="train it again from its configuration",
            )
        return found

    @cached_property
    def config(self) -> Config:
        return msgspec.convert(self.manifest["config"], Config)

    @cached_property
    def tokenizer(self) -> str:
        """JSON of its tokenizer."""
        return self.view.document("tokenizer")["json"]

    @cached_property
    def text_tokenizer(self) -> Tokenizer:
        """The tokenizer itself, which takes a while to parse."""
        return Tokenizer(self.tokenizer)

    @cached_property
    def catalogue(self) -> Catalogue:
        """Which tasks there are and what each runs on; read page by page."""
        return Catalogue(self.view, self.manifest)

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """Names of all tasks, in the order they came; `has` asks for one without reading all."""
        if "tasks" in self.manifest:
            return tuple(self.manifest["tasks"])
        return tuple(line.task for line in self.catalogue.lines())

    def has(self, task: str) -> bool:
        """Whether there is a task of this name."""
        return bool(task) and self.view.has(f"tasks/{task}")

    @property
    def bank_sizes(self) -> list[dict[str, int]]:
        """Per routed layer, experts by kind."""
        return self.manifest["banks"]

    @property
    def routed_layers(self) -> list[int]:
        """The numbers of the layers that have experts."""
        return self.config.model.routed_layers

    def entry(self, task: str) -> TaskEntry:
        """One task; an unknown name is an error that suggests the nearest, never another task."""
        if task not in self._entries:
            if not self.view.has(f"tasks/{task}"):
                raise unknown("task", task, self.tasks, where=self.path)
            self._entries[task] = entry_from_json(self.view.document(f"tasks/{task}"))
        return self._entries[task]

    def entries(self, tasks: Sequence[str] | None = None) -> list[TaskEntry]:
        """Several tasks (all by default), read together."""
        names = self.tasks if tasks is None else tasks
        missing = [name for name in names if name not in self._entries and self.has(name)]
        for name, found in zip(missing, self.view.documents(f"tasks/{name}" for name in missing), strict=True):
            self._entries[name] = entry_from_json(found)
        return [self.entry(name) for name in names]

    def gate(self, name: str) -> GateSpec:
        """The candidates of a gate."""
        if name not in self._gates:
            self._gates[name] = gate_from_json(self.view.document(f"gates/{name}/candidates"))
        return self._gates[name]

    def gates(self, names: Sequence[str]) -> dict[str, GateSpec]:
        """The candidates of several gates, read together."""
        missing = [name for name in names if name not in self._gates]
        found = self.view.documents(f"gates/{name}/candidates" for name in missing)
        self._gates.update((name, gate_from_json(one)) for name, one in zip(missing, found, strict=True))
        return {name: self._gates[name] for name in names}

    def copied(self, encoders: str) -> EncoderCopy:
        """What of the encoders of this name is a copy of its own."""
        if encoders not in self._copied:
            self._copied[encoders] = encoder_copy_from_json(self.view.document(f"encoders/{encoders}/copied"))
        return self._copied[encoders]

    def submodel(self, tasks: str | Iterable[str]) -> SubModel:
        """A small network with the components of these tasks only; the last few are kept for the next call.

        Raises:
            UserError: an unknown task, or tasks with different encoders.
        """
        names = (tasks,) if isinstance(tasks, str) else tuple(tasks)
        if names not in self._submodels:
            entries = [self.entry(task) for task in names]
            layout = self.layout(entries)
            self._submodels[names] = read_submodel(self.config, entries, layout, self.tokenizer, self.read)
            if len(self._submodels) > KEPT:
                self._submodels.popitem(last=False)
        self._submodels.move_to_end(names)
        return self._submodels[names]

    def predict(self, task: str | Mapping[str, Any], rows: Any = None, *, folder: str | Path = ".") -> Any:
        """`predict(task, rows)` gives one table, `predict({task: rows})` one for each; see `pathways.inference`."""
        from pathways.inference import predict, predict_many

        if isinstance(task, str):
            return predict(self, task, rows, folder=folder)
        return predict_many(self, task, folder=folder)

    def evaluate(self, tasks: str | Sequence[str] | None = None, split: Any = "test", **options: Any) -> list[Any]:
        """An `Evaluation` of each task, all by default; see `pathways.evaluation.evaluate` for the options."""
        from pathways.evaluation import evaluate

        return evaluate(self, [tasks] if isinstance(tasks, str) else tasks, split, **options)

    def suggest(self, task: str, pool: Any, n: int = 50, **options: Any) -> Any:
        """The rows of a pool whose labels would help a task most, see `pathways.suggesting.suggest`."""
        from pathways.suggesting.suggest import suggest

        return suggest(self, task, pool, n, **options)

    def layout(
        self,
        entries: Sequence[TaskEntry],
        gates: Mapping[str, GateSpec] | None = None,
        copied: EncoderCopy | None = None,
    ) -> Layout:
        """What a network for these tasks holds. `gates` and `copied` are of tasks that are not in the model yet."""
        pathways = [entry.pathway for entry in entries]
        if len({pathway.encoders for pathway in pathways}) > 1:
            raise UserError(
                "Tasks with encoders of their own do not stand in one network with others.",
                where=self.path,
                got=", ".join(entry.name for entry in entries),
                fix="ask for one network at a time: `Model.networks` divides tasks so",
            )
        known = dict(gates or {})
        specs = {p.gate: known.get(p.gate) or self.gate(p.gate) for p in pathways}
        vocab = self.config.encoders.vocab_size
        copied = self.copied(pathways[0].encoders) if copied is None else copied
        return plan_network(self.config.model, vocab, pathways, specs, [entry.fitted for entry in entries], copied)

    def read(self, parts: list[Part]) -> list[np.ndarray]:
        """Values of components, fetched together."""
        wanted = {part.name: part.rows if isinstance(part.rows, np.ndarray) else None for part in parts}
        values = self.view.read_many(wanted)
        return [values[part.name][part.rows] if isinstance(part.rows, int) else values[part.name] for part in parts]

    def groups(self) -> dict[tuple[str, str], list[str]]:
        """Tasks that share norms and gate, and so one network."""
        found: dict[tuple[str, str], list[str]] = {}
        for line in self.catalogue.lines():
            found.setdefault(line.group, []).append(line.task)
        return found

    def networks(self, tasks: Sequence[str]) -> list[tuple[str, ...]]:
        """These tasks, divided into those that are run together in one network: tasks that share their norms.

        What a task computes depends, in the last bits, on the shapes of the network that it is run in. A task that is
        added has norms of its own, so it never enters the network of others, whose values stay what they were.
        """
        found: dict[str, list[str]] = {}
        for task in tasks:
            found.setdefault(self.entry(task).pathway.norms, []).append(task)
        return [tuple(dict.fromkeys(names)) for names in found.values()]


def open_for_writing(path: str | os.PathLike[str]) -> tuple[Store, Model]:
    """The newest version, for a commit."""
    store = Store.open(beside(path, STORE), mode="w")
    return store, Model(path, store)


def create_store(path: str | os.PathLike[str]) -> Store:
    """A new store in a model's folder, which is made if need be."""
    target = beside(path, STORE)
    if "://" not in target:
        try:
            Path(path).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError("The model's folder cannot be made.", where=os.fspath(path), got=str(error)) from None
    return Store.create(target)


def task_document(entry: TaskEntry) -> dict[str, Any]:
    """A task as it is stored."""
    return {"fitted": entry.fitted.to_json(), "pathway": entry.pathway.to_json(), "notes": entry.notes}


def entry_from_json(found: Mapping[str, Any]) -> TaskEntry:
    """The inverse of `task_document`."""
    return TaskEntry(FittedTask.from_json(found["fitted"]), pathway_from_json(found["pathway"]), found["notes"])


def manifest_document(config: Config, head: Mapping[str, Any], banks: Sequence[Mapping[str, int]]) -> dict[str, Any]:
    """The document that says what the model is.

    Args:
        head: what it says of the catalogue, see `pathways.catalogue`.
    """
    sections = {name: dataclasses.asdict(getattr(config, name)) for name in SECTIONS}
    return {"format": FORMAT, "config": sections, "catalogue": head, "banks": [dict(b) for b in banks]}


def manifest_with(model: Model, **parts: Any) -> dict[str, Any]:
    """The manifest with some parts replaced; it has a catalogue from then on, and no list of all tasks."""
    return {**{key: value for key, value in model.manifest.items() if key != "tasks"}, **parts}


def changes_for(
    found: Mapping[str, tuple[np.ndarray | None, np.ndarray]],
    sizes: Callable[[str], int],
) -> Changes:
    """A commit's arrays from a network taken apart (`assemble.components`).

    Rows of a bank past its size are appended, others replaced; whole arrays are put.

    Args:
        sizes: the rows a bank has now, by the array's name; 0 if it does not exist.
    """
    changes = Changes()
    for name, (rows, value) in found.items():
        if rows is None:
            changes.put[name] = value
            continue
        size = sizes(name)
        old, new = rows < size, rows >= size
        if size == 0:
            changes.put[name] = value
        else:
            if old.any():
                changes.put_rows[name] = (rows[old], value[old])
            if new.any():
                changes.append[name] = value[new]
    return changes
