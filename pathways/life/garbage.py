"""Garbage collection by reference count: experts that no gate can choose, components whose task is gone.

Removing a task frees what it alone used, and compaction gives back what only dropped versions held. What is left are
experts whose last user was not the task they were made for, and what another program left behind. Collecting makes a
new version, so nothing that an older, kept version needs is touched.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from pathways.adding.commit import bank_of
from pathways.adding.protect import Allowed, check
from pathways.adding.search import free_experts
from pathways.life.users import Expert, Users, experts_in
from pathways.model import Model, manifest_with, open_for_writing, row_chunked
from pathways.pathway import BASE, encoder_names, gate_names, head_names
from pathways.store import Changes, Version

OWNERS = ("tasks/", "cards/", "heads/", "norms/", "gates/", "probes/", "encoders/own/")
"""Where components stand that a task or a gate of a task needs; all else is the model's."""


@dataclass(frozen=True)
class Garbage:
    """What no task needs: experts that no gate can choose, names that no task's pathway leads to."""

    experts: tuple[Expert, ...]
    components: tuple[str, ...]


def garbage(model: Model) -> Garbage:
    """Counts references to everything that can have a user. Experts of the joint training count as the model's own."""
    users = Users(model).gates_of
    if model.view.has(f"gates/{BASE}/candidates"):
        users |= {expert: [BASE] for expert in experts_in(model, model.gate(BASE).candidates) if expert not in users}
    free = set(experts_in(model, [{k: tuple(v) for k, v in layer.items()} for layer in free_experts(model)]))
    trained = model.config.model.experts
    experts = [
        expert
        for layer, kinds in zip(model.routed_layers, model.bank_sizes, strict=True)
        for kind, size in kinds.items()
        for expert in (Expert(layer, kind, i) for i in range(trained.get(kind, 0), size))
        if expert not in users and expert not in free
    ]
    needed = referenced(model)
    standing = [name for prefix in OWNERS for name in model.view.names(prefix)]
    return Garbage(tuple(experts), tuple(name for name in standing if name not in needed))


def referenced(model: Model) -> set[str]:
    """Names of all components that stand for tasks and that some task, or the shared pathway, needs."""
    layers, found = model.routed_layers, set[str]()
    lines = model.catalogue.lines()
    for line in lines:
        found |= {f"tasks/{line.task}", f"cards/{line.task}", *head_names(line.task)}
    for norms in {BASE, *(line.norms for line in lines)}:
        found.add(f"norms/{norms}")
    for gate in {BASE, *(line.gate for line in lines)}:
        found |= {f"gates/{gate}/candidates", f"probes/{gate}", *gate_names(gate, layers)}
    for encoders in {line.encoders for line in lines} - {BASE}:
        found |= {*encoder_names(encoders, model.copied(encoders))}
    return found


def collect(model_path: str | os.PathLike[str]) -> tuple[Garbage, Version | None]:
    """Commits a version without garbage; the places of its experts are free for later tasks.

    Returns:
        What went, and the version; None where there was nothing.

    Raises:
        UserError: a task that is there would change. Nothing is committed then.
    """
    store, model = open_for_writing(model_path)
    found = garbage(model)
    if not found.experts and not found.components:
        return found, None
    rows: dict[str, list[int]] = {}
    for expert in found.experts:
        rows.setdefault(f"layer{expert.layer}/{expert.kind}", []).append(expert.index)
    pages, head = model.catalogue.changed()
    manifest = manifest_with(model, catalogue=head, free=_free(model, rows))
    changes = Changes(remove=list(found.components), documents={**pages, "manifest": manifest})
    for bank in model.view.names("banks/"):
        layer, kind = bank_of(bank)
        if index := rows.get(f"layer{layer}/{kind}"):
            shape, dtype, _ = model.view.array_info(bank)
            changes.put_rows[bank] = (np.array(index), np.zeros((len(index), *shape[1:]), dtype))
    allowed = Allowed(removed=frozenset(found.components), rows=rows)
    message = f"collected {len(found.experts)} experts and {len(found.components)} components that no task needs"
    return found, store.commit(changes, message, row_chunked=row_chunked, check=check(model, allowed))


def _free(model: Model, rows: dict[str, list[int]]) -> list[dict[str, list[int]]]:
    """The free places of each layer with those of `rows`."""
    found = []
    for layer, sizes, known in zip(model.routed_layers, model.bank_sizes, free_experts(model), strict=True):
        places = {kind: sorted({*known.get(kind, ()), *rows.get(f"layer{layer}/{kind}", ())}) for kind in sizes}
        found.append({kind: index for kind, index in places.items() if index})
    return found
