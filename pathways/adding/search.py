"""Ranks the experts that a new task may start from, and the tasks nearest to it; `pathways.search` tries them.

A seeded sample of the task's rows goes through the model on its *reference* pathway (the largest group of tasks that
share norms and gate). An expert's score in a layer is the share of the sample's choices that it got there, plus the
share it has with the nearest tasks, weighted by how near they are. Nearness is the cosine between mean pooled
embeddings, from which the mean over the model's tasks is taken off first, as all tasks lie far out on one side.

Axis letters: D width, N tasks of the model, E experts of a layer, all kinds one after the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pathways.data import subset
from pathways.model import Model
from pathways.pathway import BASE, Experts
from pathways.profile import profiles
from pathways.report import Reused
from pathways.retrieval import embeddings
from pathways.submodel import SubModel
from tasks.cache import EncodedSplit
from tasks.errors import UserError

SAMPLE_ROWS = 256
NEAREST = 3
"""Tasks whose experts speak for a new one."""
AROUND = 64
"""Tasks, the nearest, among which the users of an expert are looked for."""
USERS = 3
"""Tasks that the card names for an expert."""

Slot = tuple[str, int]
"""An expert of a layer: its kind and its index in that bank."""


@dataclass(frozen=True)
class Choice:
    """What a search found.

    Attributes:
        experts: per routed layer, the experts to start from.
        ranked: per routed layer, the same as (kind, index), best first.
        nearest: the nearest tasks, nearest first.
        similarity: their cosines.
        reused: the same experts, each with the tasks that lean on it most.
        embedding: `[D]`, the mean of the sample's pooled rows.
    """

    experts: tuple[Experts, ...]
    ranked: tuple[tuple[Slot, ...], ...]
    nearest: tuple[str, ...]
    similarity: tuple[float, ...]
    reused: tuple[Reused, ...]
    embedding: tuple[float, ...]


def reference(model: Model) -> tuple[str, str]:
    """Norms and gate that a new task borrows: those of the largest group of tasks, the oldest of equals.

    A group with encoders of its own comes last: its norms and gate were trained over other rows than the shared ones.
    """
    shared = {group: count for group, count in model.catalogue.shared.items() if group[2] == BASE}
    if shared:
        norms, gate, _ = max(shared, key=lambda group: shared[group])
        return norms, gate
    alone = next((line.group for line in model.catalogue.first() if line.encoders == BASE), None)
    if alone is not None:
        return alone
    if model.view.has(f"gates/{BASE}/candidates"):
        return BASE, BASE
    any_group = next((line.group for line in model.catalogue.first()), None)
    if any_group is not None:
        return any_group
    raise UserError(
        "The model has no task left to start from.", where=model.path, fix="undo a removal: see `pathways log`"
    )


def choose(model: Model, sub: SubModel, train: EncodedSplit, *, per_layer: int, seed: int) -> Choice:
    """Chooses `per_layer` experts in each routed layer, fewer where there are fewer.

    The seed draws the sample; the rest is arithmetic, and of equal scores the lower kind and index goes first.

    Args:
        sub: the reference pathway, holding the new task alone.
        train: its rows.
    """
    task = sub.names[0]
    sample = [train.example(i) for i in subset(train, SAMPLE_ROWS, seed)]
    own = profiles(sub, {task: sample})[task]
    around = nearest_tasks(np.array(own["embedding"]), embeddings(model), AROUND, least=-np.inf)
    known = {entry.name: entry.notes["profile"] for entry in model.entries(list(around))}
    near = {name: cosine for name, cosine in list(around.items())[:NEAREST] if cosine > 0}
    slots = [_slots(model, layer) for layer in range(len(model.bank_sizes))]
    scores = []
    for layer, names in enumerate(slots):
        score = shares(own, layer, names)
        weight = sum(near.values())
        for name, similarity in near.items():
            score = score + similarity / weight * shares(known[name], layer, names)
        scores.append(score)
    config = model.config.model
    ranked = _best(scores, slots, max(per_layer, config.gate.top_k), config.scan_layers)
    experts = tuple(by_kind(layer, list(config.experts)) for layer in ranked)
    reused = _reused(model, known, ranked, slots)
    return Choice(experts, ranked, tuple(near), tuple(near.values()), reused, tuple(own["embedding"]))


def nearest_tasks(
    own: np.ndarray, others: Mapping[str, np.ndarray], most: int = NEAREST, least: float = 0.0
) -> dict[str, float]:
    """At most so many tasks with a cosine to `own [D]` above `least`, nearest first."""
    if not others:
        return {}
    table = np.stack(list(others.values()))
    # Two points less their mean are opposite, and one is zero: too few to take a mean off.
    centre = table.mean(axis=0) if len(table) > 2 else np.zeros_like(own)
    table, own = table - centre, own - centre
    cosine = table @ own / np.maximum(np.linalg.norm(table, axis=1) * np.linalg.norm(own), 1e-12)
    names = list(others)
    return {names[i]: float(cosine[i]) for i in np.argsort(-cosine, kind="stable")[:most] if cosine[i] > least}


def shares(profile: Mapping[str, Any], layer: int, slots: Sequence[Slot]) -> np.ndarray:
    """`[E]`: the share of each expert in a stored profile."""
    usage = profile["usage"][layer]
    return np.array([usage.get(kind, {}).get(str(index), 0.0) for kind, index in slots])


def free_experts(model: Model) -> list[dict[str, list[int]]]:
    """Per routed layer and kind, places in the bank that no task uses any more."""
    return model.manifest.get("free") or [{} for _ in model.bank_sizes]


def _slots(model: Model, layer: int) -> list[Slot]:
    free = {kind: set(index) for kind, index in free_experts(model)[layer].items()}
    sizes = model.bank_sizes[layer].items()
    return [(kind, i) for kind, size in sizes for i in range(size) if i not in free.get(kind, ())]


def _best(
    scores: Sequence[np.ndarray], slots: Sequence[list[Slot]], most: int, alike: bool
) -> tuple[tuple[Slot, ...], ...]:
    """The best of each layer; `alike` takes as many of each kind everywhere as in the first layer, for scanning."""
    found: list[tuple[Slot, ...]] = []
    for score, names in zip(scores, slots, strict=True):
        best = [names[i] for i in np.argsort(-score, kind="stable")]
        if alike and found:
            quota = Counter(kind for kind, _ in found[0])
            best = [one for one in best if one in [b for b in best if b[0] == one[0]][: quota[one[0]]]]
        found.append(tuple(best[:most]))
    return tuple(found)


def by_kind(chosen: Sequence[Slot], kinds: Sequence[str]) -> Experts:
    """Experts of a layer under their kinds, in the order of `kinds`; kinds without any are left out."""
    layer = {kind: tuple(sorted(i for k, i in chosen if k == kind)) for kind in kinds}
    return {kind: index for kind, index in layer.items() if index}


def _reused(
    model: Model, known: Mapping[str, Any], ranked: Sequence[Sequence[Slot]], slots: Sequence[list[Slot]]
) -> tuple[Reused, ...]:
    """For each expert the tasks that give it more than an even share, most first; the one that gives most if none."""
    found, tasks = [], list(known)
    for layer, (chosen, names) in enumerate(zip(ranked, slots, strict=True)):
        for kind, index in chosen:
            column = np.array([shares(profile, layer, [(kind, index)])[0] for profile in known.values()])
            order = np.argsort(-column, kind="stable")[:USERS]
            heavy = [i for i in order if column[i] > 1 / len(names)] or [i for i in order[:1] if column[i] > 0]
            found.append(Reused(model.routed_layers[layer], kind, index, tuple(tasks[i] for i in heavy)))
    return tuple(found)
