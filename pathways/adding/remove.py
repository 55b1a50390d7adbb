"""Taking a task away, and going back to an earlier version. Both make a new version; nothing is lost."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from pathways.adding.commit import bank_of
from pathways.adding.protect import Allowed, check
from pathways.adding.search import free_experts
from pathways.model import STORE, Model, beside, manifest_with, open_for_writing, row_chunked
from pathways.pathway import Experts, encoder_names, gate_names, head_names, private
from pathways.retrieval import clear_row
from pathways.store import Changes, Store, Version
from tasks.errors import UserError


def remove_task(model_path: str | os.PathLike[str], name: str) -> Version:
    """Removes a task: its document, card, head, private norms, gate, encoders and probe; what it shares stays.

    The experts it owns that no other task uses are set to zero and their places are free for later tasks.

    Raises:
        UserError: no such task (the nearest is named), or another task would change.
    """
    store, model = open_for_writing(model_path)
    entry = model.entry(name)
    freed = freed_experts(model, name)
    names = private_names(model, name)
    rows = {
        f"layer{number}/{kind}": index
        for number, layer in zip(model.routed_layers, freed, strict=True)
        for kind, index in layer.items()
    }
    pages, manifest = shrunk_manifest(model, name, freed)
    changes = Changes(remove=names, documents={**pages, "manifest": manifest})
    for bank in model.view.names("banks/"):
        layer, kind = bank_of(bank)
        index = rows.get(f"layer{layer}/{kind}", ())
        if index:
            shape, dtype, _ = model.view.array_info(bank)
            changes.put_rows[bank] = (np.array(index), np.zeros((len(index), *shape[1:]), dtype))
    line = model.catalogue.find(name)
    assert line is not None
    free = {**_rows(model, free_experts(model)), **rows, **clear_row(changes, model, line.number)}
    allowed = Allowed(removed=frozenset(names), rows=free)
    protect = check(model, allowed, first=entry.pathway.parents)
    return store.commit(changes, f"removed task {name}", row_chunked=row_chunked, check=protect)


def undo(model_path: str | os.PathLike[str], to: int | str | None = None) -> Version:
    """Makes the content of version `to` (its number or name; by default the one before the newest) the newest version.

    Raises:
        UserError: no such version, or one that holds no model: the store is empty until training commits.
    """
    store = Store.open(beside(model_path, STORE), mode="w")
    parents = {version.number: version.parent for version in store.log()}
    given = Store.open(store.path, to).version if isinstance(to, str) else to
    target = parents[store.version] if given is None else given
    if target is not None and not store.at(target).has("manifest"):
        raise UserError(
            "There is no model to go back to in that version.",
            where=os.fspath(model_path),
            expected="a version that a commit of a model made: `pathways log` lists them",
            got=f"version {target}, which is from before the model was trained",
        )
    return store.undo() if given is None else store.revert(given, f"back to version {target}")


def private_names(model: Model, name: str) -> list[str]:
    """Components of one task alone, each by its whole name: `a` may be removed while `a/b` stays."""
    pathway = model.entry(name).pathway
    names = [f"tasks/{name}", f"cards/{name}", *head_names(name)]
    others = [line for line in model.catalogue.lines() if line.task != name]
    if pathway.norms == private(name) and all(p.norms != pathway.norms for p in others):
        names.append(f"norms/{pathway.norms}")
    if pathway.gate == private(name) and all(p.gate != pathway.gate for p in others):
        names += [f"gates/{pathway.gate}/candidates", *gate_names(pathway.gate, model.routed_layers)]
        names.append(f"probes/{pathway.gate}")
    if pathway.encoders == private(name):
        names += encoder_names(pathway.encoders, model.copied(pathway.encoders))
    return [found for found in names if model.view.has(found)]


def freed_experts(model: Model, name: str) -> tuple[Experts, ...]:
    """Per routed layer, the added experts that this task's gate can choose, or that it owns, and no other task's can.

    Those that joint training made stay. One that was made for another task, which is gone, goes with its last user.
    """
    others = {line.gate for line in model.catalogue.lines() if line.task != name}
    used = [spec.candidates for spec in model.gates(sorted(others)).values()]
    pathway, trained = model.entry(name).pathway, model.config.model.experts
    freed = []
    for layer, candidates in enumerate(model.gate(pathway.gate).candidates):
        owned = pathway.owned[layer] if pathway.owned else {}
        mine = {kind: {*candidates.get(kind, ()), *owned.get(kind, ())} for kind in {**candidates, **owned}}
        taken = {kind: {i for spec in used for i in spec[layer].get(kind, ())} for kind in mine}
        left = {kind: [i for i in index - taken[kind] if i >= trained.get(kind, 0)] for kind, index in mine.items()}
        freed.append({kind: tuple(sorted(index)) for kind, index in left.items() if index})
    return tuple(freed)


def shrunk_manifest(model: Model, name: str, freed: tuple[Experts, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Changed pages of the catalogue, and the manifest without the task, its experts' places free."""
    free = []
    for known, new in zip(free_experts(model), freed, strict=True):
        kinds = dict.fromkeys([*known, *new])
        free.append({kind: sorted({*known.get(kind, ()), *new.get(kind, ())}) for kind in kinds})
    pages, head = model.catalogue.changed(remove=[name])
    return pages, manifest_with(model, catalogue=head, free=free)


def _rows(model: Model, layers: Any) -> dict[str, list[int]]:
    named = zip(model.routed_layers, layers, strict=True)
    return {f"layer{number}/{kind}": list(index) for number, layer in named for kind, index in layer.items()}
