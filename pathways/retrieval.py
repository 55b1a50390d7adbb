"""The index by which similar tasks are found: one embedding per task, a row each, in one array.

Row n is that of the task with number n in the catalogue; a task that is added appends one. So ten thousand tasks are
compared without opening their documents. A row of zeros is a task that is gone, or one without a profile. A model from
before there was an index has none, and is asked for the profile of each task.

Axis letters: N numbers of the catalogue, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pathways.model import RETRIEVAL, Model
from pathways.store import Changes
from pathways.submodel import TaskEntry


def embeddings(model: Model) -> dict[str, np.ndarray]:
    """Task -> the mean embedding `[D]` of its examples, of all tasks that have one, in the order they came."""
    if not model.view.has(RETRIEVAL):
        return {e.name: np.asarray(p["embedding"]) for e in model.entries() if (p := e.notes.get("profile"))}
    table = model.view.read(RETRIEVAL)
    lines = [line for line in model.catalogue.lines() if line.number < len(table)]
    return {line.task: table[line.number].astype(np.float64) for line in lines if table[line.number].any()}


def table_of(entries: Sequence[TaskEntry], width: int) -> np.ndarray:
    """`[N, D]` float32 of tasks whose numbers are their places."""
    return np.stack([_row(entry.notes, width) for entry in entries]) if entries else np.zeros((0, width), np.float32)


def append_row(changes: Changes, model: Model, number: int, notes: Mapping[str, Any]) -> None:
    """Has a commit append the row of a task that is added under this number; nothing where there is no index."""
    if not model.view.has(RETRIEVAL):
        return
    (size, width), _, _ = model.view.array_info(RETRIEVAL)
    gap = np.zeros((number - size, width), np.float32)
    changes.append[RETRIEVAL] = np.concatenate([gap, _row(notes, width)[None]])


def clear_row(changes: Changes, model: Model, number: int) -> dict[str, list[int]]:
    """Has a commit forget the row of a task that is removed; gives the rows that may change by it."""
    if not model.view.has(RETRIEVAL):
        return {}
    (size, width), _, _ = model.view.array_info(RETRIEVAL)
    if number >= size:
        return {}
    changes.put_rows[RETRIEVAL] = (np.array([number]), np.zeros((1, width), np.float32))
    return {RETRIEVAL.partition("/")[2]: [number]}


def _row(notes: Mapping[str, Any], width: int) -> np.ndarray:
    profile = notes.get("profile")
    return np.asarray(profile["embedding"], np.float32) if profile else np.zeros(width, np.float32)
