"""A task under another name, or twice: what is its own moves or is copied, experts stay where they are.

Both run the old task and the new one on its stored probe rows, inside the commit, and want the same bits.
"""

from __future__ import annotations

import io
import os
from dataclasses import replace
from typing import Any

import numpy as np

from pathways.adding.protect import Allowed, check, for_tasks, probe_logits, read_probe
from pathways.adding.remove import private_names
from pathways.model import Model, manifest_with, open_for_writing, row_chunked, task_document
from pathways.pathway import BASE, Pathway, encoder_names, gate_names, head_names, private
from pathways.retrieval import append_row
from pathways.store import Changes, Version
from pathways.store.store import Check
from pathways.store.view import View
from pathways.submodel import TaskEntry
from tasks.check import check_name
from tasks.errors import UserError

PARTS = ("norms", "gate", "encoders")
"""Of a pathway, what may be the task's own."""


def copy_task(model_path: str | os.PathLike[str], task: str, new: str) -> Version:
    """A second task that computes what the first does, with a head, norms, a gate and rows of encoders of its own.

    Its gate means the same experts. Those made for the first stay as long as one of the two is there.

    Raises:
        UserError: no such task, or a name that is taken or is none. The model is as it was then.
    """
    store, model = open_for_writing(model_path)
    entry = model.entry(task)
    _check_new(model, new)
    own = private(new)
    encoders = BASE if entry.pathway.encoders == BASE else own
    pathway = replace(
        entry.pathway,
        task=new,
        norms=own,
        gate=own,
        encoders=encoders,
        origin="copied",
        parents=(task,),
        owned=tuple({} for _ in model.routed_layers),
    )
    notes = {key: value for key, value in entry.notes.items() if key != "was"}
    made = renamed_entry(entry, new, pathway, notes)
    changes = moved(model, entry, pathway)
    append_row(changes, model, model.catalogue.next, notes)
    pages, head = model.catalogue.changed(add=[pathway])
    documents = {**pages, f"tasks/{new}": task_document(made), "manifest": manifest_with(model, catalogue=head)}
    changes.documents |= documents
    protect = check(model, first=[task])
    return store.commit(
        changes,
        f"copied task {task} to {new}",
        row_chunked=row_chunked,
        check=both(protect, lambda staged: same_bits(model, staged, task, new)),
    )


def rename_task(model_path: str | os.PathLike[str], task: str, new: str) -> Version:
    """The same task under another name. Routing statistics that were recorded stay under the old one.

    Raises:
        UserError: no such task, or a name that is taken or is none. The model is as it was then.
    """
    store, model = open_for_writing(model_path)
    entry = model.entry(task)
    _check_new(model, new)
    old, own = private(task), private(new)
    names = {part: own if getattr(entry.pathway, part) == old else getattr(entry.pathway, part) for part in PARTS}
    pathway = replace(entry.pathway, task=new, **names)
    made = renamed_entry(entry, new, pathway, {**entry.notes, "was": [*entry.notes.get("was", ()), task]})
    changes = moved(model, entry, pathway)
    changes.remove = private_names(model, task)
    pages, head = model.catalogue.changed(replace={task: pathway})
    documents = {**pages, f"tasks/{new}": task_document(made), "manifest": manifest_with(model, catalogue=head)}
    changes.documents |= documents
    allowed = Allowed(
        changed=frozenset({"manifest", f"probes/{pathway.gate}"}),
        removed=frozenset(changes.remove),
    )
    protect = check(model, allowed, first=entry.pathway.parents)
    return store.commit(
        changes,
        f"renamed task {task} to {new}",
        row_chunked=row_chunked,
        check=both(protect, lambda staged: same_bits(model, staged, task, new)),
    )


def both(first: Check, second: Check) -> Check:
    """One check after the other."""

    def run(staged: View) -> None:
        first(staged)
        second(staged)

    return run


def _check_new(model: Model, new: str) -> None:
    check_name(new)
    if model.has(new):
        raise UserError("The model has a task of this name already.", where=model.path, got=new)


def renamed_entry(entry: TaskEntry, new: str, pathway: Pathway, notes: dict[str, Any]) -> TaskEntry:
    return TaskEntry(replace(entry.fitted, task=replace(entry.fitted.task, name=new)), pathway, notes)


def moved(model: Model, entry: TaskEntry, to: Pathway) -> Changes:
    """The task's components under the names of `to`: all that is not shared by both."""
    was, layers = entry.pathway, model.routed_layers
    pairs = list(zip(head_names(was.task), head_names(to.task), strict=True))
    if to.norms != was.norms:
        pairs.append((f"norms/{was.norms}", f"norms/{to.norms}"))
    if to.gate != was.gate:
        pairs += zip(gate_names(was.gate, layers), gate_names(to.gate, layers), strict=True)
    if to.encoders != was.encoders:
        copied = model.copied(was.encoders)
        pairs += list(zip(encoder_names(was.encoders, copied), encoder_names(to.encoders, copied), strict=True))[1:]
    there = [pair for pair in pairs if model.view.has(pair[0])]
    values = model.view.read_many({old: None for old, _ in there})
    changes = Changes(put={new: values[old] for old, new in there})
    if to.gate != was.gate:
        changes.documents[f"gates/{to.gate}/candidates"] = model.gate(was.gate).to_json()
    if to.encoders != was.encoders:
        changes.documents[f"encoders/{to.encoders}/copied"] = model.copied(was.encoders)
    if model.view.has(f"cards/{was.task}"):
        changes.documents[f"cards/{to.task}"] = {**model.view.document(f"cards/{was.task}"), "task": to.task}
    if model.view.has(f"probes/{was.gate}"):
        blob = model.view.blob(f"probes/{was.gate}")
        probe = renamed_probe(blob, was.task, to.task, alone=to.gate != was.gate)
        if probe is not None:
            changes.blobs[f"probes/{to.gate}"] = probe
    return changes


def renamed_probe(blob: bytes, task: str, new: str, *, alone: bool) -> bytes | None:
    """A probe in which the task has another name; `alone`: without the examples of others, None if there are no more.

    Tasks that have no example in it are named no longer.
    """
    names, batch = read_probe(blob)
    shown = [name for place, name in enumerate(names) if (batch["task"] == place).any()]
    kept = [name for name in shown if name == task or not alone]
    if not kept:
        return None
    others = [new if name == task else name for name in kept]
    batch = for_tasks(batch, names, kept)
    out = io.BytesIO()
    with np.load(io.BytesIO(blob), allow_pickle=False) as found:
        arrays: dict[str, Any] = {key: found[key] for key in found.files if key != "names"}
    np.savez_compressed(out, **arrays | {"names": np.array(others, np.str_), "batch/task": batch["task"]})
    return out.getvalue()


def same_bits(old: Model, staged: View, task: str, new: str) -> None:
    """Both tasks on the new one's probe rows. Without a row there, as for the last of very many tasks, none is run.

    Raises:
        UserError: their logits differ, or there are none to compare although the probe names the task.
    """
    then = Model(old.path, staged)
    blob = f"probes/{then.entry(new).pathway.gate}"
    if not staged.has(blob):
        return
    names, batch = read_probe(staged.blob(blob))
    if new not in names:
        return
    batch = for_tasks(batch, names, [new])
    was, now = probe_logits(old.submodel(task), batch), probe_logits(then.submodel(new), batch)
    if not was[0].size or any(a.tobytes() != b.tobytes() for a, b in zip(was, now, strict=True)):
        raise UserError(
            "The task would compute other values under its new name; nothing was committed.",
            where=old.path,
            expected=f"the logits of {task} on its stored probe rows, bit for bit",
            fix="this is a fault of the program or of the machine, not yours: please report it",
        )
