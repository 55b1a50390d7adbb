"""The promise to old tasks, checked inside the commit: their bytes and their logits are what they were.

Two checks look at the state about to be committed, and a difference aborts it:

- by digest, every component that stood before is equal, but for those the commit says it touches; of a bank, every
  row that is not free; and every task of the catalogue is still in it. What the transaction holds no write for is
  equal without being looked at, so this costs what the commit costs, however large the model is;
- by running them, the logits of old tasks on stored probe rows are bitwise equal, on this platform and batch shape.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pathways.catalogue import PREFIX
from pathways.model import Model
from pathways.predictions import SMALL_ROWS, run_shape
from pathways.store.records import PAGE_ROWS, Entry, parts_of
from pathways.store.view import View
from pathways.submodel import SubModel
from tasks.encoded import Example
from tasks.errors import UserError
from tasks.pack import Packer

MOST_GROUPS = 16
"""Groups of tasks whose logits are compared; the digests of all are."""
SAMPLED_PAGES = 4
"""Pages of the catalogue from which these groups are drawn."""

Group = tuple[str, str]
"""Names of norms and of the gate that some tasks share."""


@dataclass(frozen=True)
class Allowed:
    """What a commit may do to what stood before.

    Attributes:
        changed: names that may differ.
        removed: names that may go.
        rows: bank, as `layer<i>/<kind>` -> rows that may differ: free ones, or those about to be freed.
        groups: those whose logits may differ.
    """

    changed: frozenset[str] = frozenset({"manifest"})
    removed: frozenset[str] = frozenset()
    rows: Mapping[str, Collection[int]] = field(default_factory=dict)
    groups: frozenset[Group] = frozenset()


def make_probe(sub: SubModel, examples: Mapping[str, Sequence[Example]]) -> bytes | None:
    """One packed batch of a few examples of each task, as an npz blob; None if no task has any.

    The first example of every task comes first, then the second of each, as long as there is room. A task for which
    there was none is not named in it.

    Args:
        sub: a sub-model of these tasks, for the batch's shape.
        examples: task -> its examples.
    """
    turns = max((len(items) for items in examples.values()), default=0)
    queue = [(task, items[i]) for i in range(turns) for task, items in examples.items() if i < len(items)]
    names = list(examples)
    small = sum(example.length for _, example in queue) <= SMALL_ROWS * sub.config.encoders.max_length // 2
    packer = Packer(run_shape(sub, sub.layout.size.streams, small))
    placed = {task for task, example in queue if packer.add(names.index(task), example)}
    if not placed:
        return None
    kept = [name for name in names if name in placed]
    out = io.BytesIO()
    batch = for_tasks({**packer.batch()}, names, kept)
    flat: dict[str, Any] = {f"batch/{name}": array for name, array in _flatten(batch)}
    np.savez_compressed(out, **{"names": np.array(kept, np.str_), **flat})
    return out.getvalue()


def for_tasks(batch: Mapping[str, Any], names: Sequence[str], kept: Sequence[str]) -> dict[str, Any]:
    """A batch in which a task's integer is its place among `kept`, where it was that among `names`; -1 if not kept."""
    place = np.array([kept.index(name) if name in kept else -1 for name in names], np.int32)
    return {**batch, "task": np.where(batch["task"] >= 0, place[batch["task"]], -1).astype(np.int32)}


def read_probe(blob: bytes) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Names of the tasks, and the batch, in which a task's integer is its place among the names."""
    batch: dict[str, Any] = {}
    with np.load(io.BytesIO(blob), allow_pickle=False) as found:
        names = tuple(str(name) for name in found["names"])
        for key in found.files:
            if key != "names":
                *parents, last = key.split("/")[1:]
                (batch.setdefault(parents[0], {}) if parents else batch)[last] = found[key]
    return names, batch


def check(
    old: Model, allowed: Allowed = Allowed(), *, first: Sequence[str] = (), seed: int = 0
) -> Callable[[View], None]:
    """A check for `Store.commit`.

    Args:
        old: the version that the commit is based on.
        first: tasks whose groups are run before a seeded sample of the others.

    Raises:
        UserError: (when called) something that stood before would be another; names it.
    """

    def run(staged: View) -> None:
        check_digests(old.view, staged, allowed)
        new = Model(old.path, staged)
        for group in chosen_groups(old, new, first, seed):
            if group not in allowed.groups:
                check_logits(old, new, group)

    return run


def check_digests(old: View, new: View, allowed: Allowed) -> None:
    """Compares every component that stood before and that the new state has a write for."""
    pending = new.pending(old)
    names = old.names() if pending is None else list(pending)
    for name, was, now in zip(names, old.find(names), new.find(names), strict=True):
        if was is None or name in allowed.changed or (now is not None and now.digest == was.digest):
            continue
        if name.startswith(PREFIX):
            _check_page(old.document(name), new.document(name) if now is not None else {}, allowed)
        elif now is None:
            if name not in allowed.removed:
                raise _broken(f"{name} would be removed")
        elif was.row_chunked and now.row_chunked:
            _check_rows(old, new, name, was, now, allowed.rows.get("/".join(name.split("/")[1:3]), ()))
        else:
            raise _broken(f"{name} would be changed")


def _check_rows(old: View, new: View, name: str, was: Entry, now: Entry, free: Collection[int]) -> None:
    """Looks into the pages of hashes that differ, and at the rows that stood before."""
    if now.shape[0] < was.shape[0]:
        raise _broken(f"{name} would lose experts: {was.shape[0]} before, {now.shape[0]} after")
    if (was.dtype, was.shape[1:]) != (now.dtype, now.shape[1:]):
        raise _broken(f"{name} would be changed")
    pages = zip(old.page_hashes(name, was), new.page_hashes(name, now), strict=False)
    differ = [page for page, (before, after) in enumerate(pages) if before != after]
    before, after = old.hash_pages(name, was, differ), new.hash_pages(name, now, differ)
    taken = set(free)
    for page in differ:
        for row, (one, other) in enumerate(zip(parts_of(before[page]), parts_of(after[page]), strict=False)):
            if one != other and page * PAGE_ROWS + row not in taken:
                raise _broken(f"expert {page * PAGE_ROWS + row} of {name} would be changed")


def _check_page(before: Mapping[str, Any], after: Mapping[str, Any], allowed: Allowed) -> None:
    """Every line of a page of the catalogue stands, but for those of tasks that may go."""
    for number, line in before.items():
        if after.get(number) != line and f"tasks/{line[0]}" not in allowed.removed:
            raise _broken(f"task {line[0]} would be lost from the catalogue")


def chosen_groups(old: Model, new: Model, first: Sequence[str], seed: int) -> list[Group]:
    """At most `MOST_GROUPS` groups that both versions have: those of the tasks in `first`, then a seeded sample.

    It is drawn from the groups that tasks share and from those on a few pages of the catalogue: all, if there are few.
    """
    wanted = [(entry.pathway.norms, entry.pathway.gate) for entry in old.entries([n for n in first if old.has(n)])]
    rng = np.random.default_rng(seed)
    drawn = [(norms, gate) for norms, gate, _ in old.catalogue.shared]
    drawn += [line.group for line in old.catalogue.sample(rng, SAMPLED_PAGES)]
    rest = [group for group in dict.fromkeys(drawn) if group not in wanted]
    order = rng.permutation(len(rest)).tolist()
    found = [group for group in [*dict.fromkeys(wanted), *(rest[i] for i in order)] if _there(old, new, group)]
    return found[:MOST_GROUPS]


def _there(old: Model, new: Model, group: Group) -> bool:
    """Whether the new version has all of a group that the old one has; a convolutional trunk has no norms."""
    names = (f"norms/{group[0]}", f"gates/{group[1]}/candidates")
    return all(new.view.has(name) for name in names if old.view.has(name))


def check_logits(old: Model, new: Model, group: Group) -> None:
    """Compares the logits of a group's stored probe rows, bit for bit."""
    blob = f"probes/{group[1]}"
    if not old.view.has(blob):
        return
    names, batch = read_probe(old.view.blob(blob))
    kept = tuple(name for name in names if old.has(name) and new.has(name))
    if not kept:
        return
    batch = for_tasks(batch, names, kept)
    before, after = (probe_logits(model.submodel(kept), batch) for model in (old, new))
    for was, now in zip(before, after, strict=True):
        if was.tobytes() != now.tobytes():
            raise _broken(f"the logits of {', '.join(kept[:5])} on stored probe rows would be others")


def probe_logits(sub: SubModel, batch: dict[str, Any]) -> list[np.ndarray]:
    """The logits of a batch's examples that have a task, and where some tag words, those of their tokens."""
    shown = batch["task"] >= 0
    tokens = (batch["segment"] > 0) & shown[np.maximum(batch["segment"] - 1, 0)]
    out = sub.run(batch)
    found = [np.asarray(out.logits)[shown]]
    return found if out.token_logits is None else [*found, np.asarray(out.token_logits)[tokens]]


def _broken(what: str) -> UserError:
    return UserError(
        "This would have changed what old tasks compute; nothing was committed.",
        expected="every component that stood before, and the logits of old tasks, bit for bit as they were",
        got=what,
        fix="this is a fault of the program or of the machine, not yours: please report it",
    )


def _flatten(batch: Mapping[str, Any]) -> list[tuple[str, np.ndarray]]:
    found = []
    for name, value in batch.items():
        inner = value.items() if isinstance(value, dict) else [(None, value)]
        found += [(f"{name}/{key}" if key else name, array) for key, array in inner]
    return found
