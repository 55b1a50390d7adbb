"""Committing a trained task: only what is new is written, and old tasks are checked before it counts.

The commit goes onto the newest version, not onto the one that training started from: another process may have
committed meanwhile. That is right as long as everything the task borrowed is unchanged, which digests tell; its
fresh experts take the places that are free now.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pathways.adding.protect import Allowed, check
from pathways.adding.search import free_experts
from pathways.adding.start import Start, fresh_places, joined
from pathways.assemble import Part, components
from pathways.model import Model, changes_for, manifest_with, open_for_writing, row_chunked, task_document
from pathways.pathway import EncoderCopy, Experts, GateSpec
from pathways.report import Card
from pathways.retrieval import append_row
from pathways.store import Changes, Version
from pathways.store.view import View
from pathways.submodel import SubModel, TaskEntry
from tasks.errors import UserError

ATTEMPTS = 3
"""Times a commit is tried when others commit in between."""


@dataclass(frozen=True)
class Trained:
    """A task ready to be committed.

    Attributes:
        whole: its private components, by name.
        copied: what it has of the encoders as a copy of its own.
        rows: bank -> values of its fresh experts, in the order of `fresh`.
        borrowed: digests of what it was trained on, see `fingerprint`.
    """

    entry: TaskEntry
    gate: GateSpec
    fresh: tuple[Experts, ...]
    copied: EncoderCopy
    whole: Mapping[str, np.ndarray]
    rows: Mapping[str, np.ndarray]
    borrowed: Mapping[str, tuple[str, ...]]
    card: Card
    probe: bytes | None


def take_apart(start: Start, trained: SubModel) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The task's own components, whole ones and the fresh rows of banks."""
    pathway, layout, model = start.entry.pathway, trained.layout, trained.config.model
    fresh = dict(zip(model.routed_layers, start.fresh, strict=True))
    prefixes = (
        f"norms/{pathway.norms}",
        f"gates/{pathway.gate}/",
        f"heads/{pathway.task}/",
        *(f"encoders/{stream}/" for stream in start.made_encoders),
        *(f"encoders/{pathway.encoders}/{leaf}" for leaf in start.copied),
        *(f"banks/layer{i}/{kind}/" for i, layer in fresh.items() for kind in layer),
    )
    whole, rows = {}, {}
    for name, (index, value) in components(trained.flat(), layout, model, lambda n: n.startswith(prefixes)).items():
        if index is None:
            whole[name] = value
        else:
            layer, kind = bank_of(name)
            rows[name] = value[np.searchsorted(index, fresh[layer][kind])]
    return whole, rows


def new_parameters(whole: Mapping[str, np.ndarray], rows: Mapping[str, np.ndarray]) -> int:
    """Numbers that the model grows by."""
    return sum(value.size for value in (*whole.values(), *rows.values()))


def fingerprint(view: View, parts: Sequence[Part]) -> dict[str, tuple[str, ...]]:
    """Digests of the components that a sub-model was read from; of banks, of the rows that it read."""
    names = {part.name: part.rows for part in parts}
    found = {}
    for name, rows in names.items():
        if not row_chunked(name):
            found[name] = (view.digest(name),)
            continue
        assert isinstance(rows, np.ndarray)
        there = rows < view.array_info(name)[0][0]
        known = iter(view.row_digests(name, rows[there]))
        found[name] = tuple(next(known) if old else "" for old in there.tolist())
    return found


def commit(path: str | os.PathLike[str], trained: Trained, parts: Sequence[Part], seed: int) -> tuple[Version, Model]:
    """Commits onto the newest version; tried again when somebody else commits first.

    Raises:
        UserError: what the task was trained on changed, its name was taken, an old task would change, a full disk.
            The store is as it was.
    """
    for attempt in range(ATTEMPTS):
        store, model = open_for_writing(path)
        _check_base(model, trained, parts)
        current = renumbered(model, trained)
        allowed = Allowed(rows=_free_rows(model))
        protect = check(model, allowed, first=current.entry.pathway.parents, seed=seed)
        message = f"added task {current.entry.name}"
        try:
            version = store.commit(changes(model, current), message, row_chunked=row_chunked, check=protect)
        except UserError:
            if attempt + 1 < ATTEMPTS and open_for_writing(path)[0].version != store.version:
                continue
            raise
        return version, Model(path, store)
    raise AssertionError("unreachable")


def _check_base(model: Model, trained: Trained, parts: Sequence[Part]) -> None:
    name = trained.entry.name
    if model.has(name):
        raise UserError("Another process added a task of this name meanwhile.", where=model.path, got=name)
    missing = [part.name for part in parts if not model.view.has(part.name)]
    changed = missing or [
        key for key, digest in fingerprint(model.view, parts).items() if trained.borrowed[key] != digest
    ]
    taken = [key for key in trained.whole if model.view.has(key)]
    if changed or taken:
        raise UserError(
            "The model was changed while the task was trained, in parts that the task builds on.",
            where=f"{model.path}, version {getattr(model.view, 'version', '?')}",
            got=", ".join([*changed, *taken][:5]),
            fix="add the task again; nothing was committed",
        )


def renumbered(model: Model, trained: Trained) -> Trained:
    """The same task, its fresh experts at the places that are free in `model`."""
    places = fresh_places(model, [sum(map(len, layer.values())) for layer in trained.fresh])
    if places == trained.fresh:
        return trained
    specs = []
    for spec, old, new in zip(trained.gate.candidates, trained.fresh, places, strict=True):
        kept = {kind: tuple(i for i in index if i not in old.get(kind, ())) for kind, index in spec.items()}
        specs.append(joined(kept, new))
    notes = {**trained.entry.notes}
    if "profile" in notes:
        usage = map(_moved_usage, notes["profile"]["usage"], trained.fresh, places)
        notes["profile"] = {**notes["profile"], "usage": list(usage)}
    entry = replace(trained.entry, pathway=replace(trained.entry.pathway, owned=places), notes=notes)
    return replace(trained, entry=entry, gate=GateSpec(tuple(specs)), fresh=places)


def _moved_usage(usage: Mapping[str, Mapping[str, float]], old: Experts, new: Experts) -> dict[str, dict[str, float]]:
    """A layer's shares, `{kind: {index: share}}`, with fresh experts at their new places."""
    found = {}
    for kind, shares in usage.items():
        place = {str(a): str(b) for a, b in zip(old.get(kind, ()), new.get(kind, ()), strict=True)}
        found[kind] = {place.get(index, index): share for index, share in shares.items()}
    return found


def changes(model: Model, trained: Trained) -> Changes:
    """The whole commit as data."""
    pathway = trained.entry.pathway
    layers = {number: i for i, number in enumerate(model.routed_layers)}
    found: dict[str, tuple[np.ndarray | None, np.ndarray]] = {name: (None, v) for name, v in trained.whole.items()}
    for name, values in trained.rows.items():
        layer, kind = bank_of(name)
        found[name] = (np.array(trained.fresh[layers[layer]][kind]), values)

    def size(name: str) -> int:
        layer, kind = bank_of(name)
        return model.bank_sizes[layers[layer]].get(kind, 0)

    made = changes_for(found, size)
    append_row(made, model, model.catalogue.next, trained.entry.notes)
    pages, manifest = grown_manifest(model, trained)
    made.documents = {
        **pages,
        f"tasks/{trained.entry.name}": task_document(trained.entry),
        f"gates/{pathway.gate}/candidates": trained.gate.to_json(),
        f"cards/{trained.entry.name}": json.loads(trained.card.to_json()),
        "manifest": manifest,
    }
    if trained.copied:
        made.documents[f"encoders/{pathway.encoders}/copied"] = trained.copied
    if trained.probe is not None:
        made.blobs = {f"probes/{pathway.gate}": trained.probe}
    return made


def grown_manifest(model: Model, trained: Trained) -> tuple[dict[str, Any], dict[str, Any]]:
    """Changed pages of the catalogue, and the manifest with one task more: banks as large as they become, places that
    are taken no longer free."""
    banks, free = [], []
    for sizes, known, fresh in zip(model.bank_sizes, free_experts(model), trained.fresh, strict=True):
        banks.append({kind: max(size, 1 + max(fresh.get(kind, (-1,)))) for kind, size in sizes.items()})
        left = {kind: sorted({*index} - {*fresh.get(kind, ())}) for kind, index in known.items()}
        free.append({kind: index for kind, index in left.items() if index})
    pages, head = model.catalogue.changed(add=[trained.entry.pathway])
    return pages, manifest_with(model, catalogue=head, banks=banks, free=free)


def bank_of(name: str) -> tuple[int, str]:
    """Layer and kind of a bank's component, `banks/layer<i>/<kind>/<leaf>`."""
    _, layer, kind, _ = name.split("/")
    return int(layer.removeprefix("layer")), kind


def _free_rows(model: Model) -> dict[str, list[int]]:
    free = zip(model.routed_layers, free_experts(model), strict=True)
    return {f"layer{number}/{kind}": index for number, layer in free for kind, index in layer.items()}
