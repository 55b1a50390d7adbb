"""More data for a task: its training goes on from where its pathway stands, and only what is its own moves.

The old values stay in the older versions. What others can choose of its experts is theirs too, and stays as it is.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from pathways.adding.commit import take_apart
from pathways.adding.fit import fit, make_recipe, metric_of, metrics_of, own_part
from pathways.adding.protect import Allowed, check
from pathways.adding.remove import freed_experts
from pathways.adding.request import check_numbers
from pathways.adding.start import Start
from pathways.convolution import refuse_adding
from pathways.data import cache_folder, encode_tasks
from pathways.describe import card_of
from pathways.life.cost import own_names
from pathways.model import Model, open_for_writing, row_chunked, task_document
from pathways.monitor import Monitor
from pathways.pathway import Experts, private
from pathways.report import Card
from pathways.store import Changes, Store, Version
from pathways.submodel import SubModel, TaskEntry
from tasks.cache import EncodedSplit
from tasks.errors import UserError
from tasks.fitted import FittedTask
from tasks.metrics import metric_names
from tasks.spec import LOWER_IS_BETTER

if TYPE_CHECKING:
    from rich.console import Console

SLOWER = 3.0
"""Against the rate of a fresh start, the default rate is lower by this: the parameters are good already."""
BEFORE = "before the update"


@dataclass(frozen=True)
class Updated:
    """A task ready to be committed again.

    Attributes:
        whole: its own components, by name; rows: bank -> values of the experts `fresh`.
    """

    entry: TaskEntry
    fresh: tuple[Experts, ...]
    whole: Mapping[str, np.ndarray]
    rows: Mapping[str, np.ndarray]
    card: Card


def update_task(
    model_path: str | os.PathLike[str],
    task: str,
    data: str | os.PathLike[str],
    *,
    valid: str | None = None,
    test: str | None = None,
    steps: int | None = None,
    learning_rate: float | None = None,
    seed: int = 0,
    force: bool = False,
    quiet: bool = False,
    console: Console | None = None,
) -> Card:
    """Trains a task on with more rows, and commits a new version if it is no worse on the validation rows.

    It learns from these rows alone: name a glob that matches the old file, too, to learn from both. The card has the
    score on the test rows, before and after. Validation and test rows are those of `valid` and `test`, or of the files
    that the task came with, or else are cut from the new rows.

    Args:
        data: rows of the same form as those the task came with: a file, a folder or a glob.
        valid, test: files; by default those the task came with, where it did.
        steps, learning_rate: by default by the number of rows, and a third of the model's own.
        force: commit one that is worse on the validation rows, too.

    Returns:
        The card, with the score before and after.

    Raises:
        UserError: no such task, one that shares its norms or gate, a number that is none, a mistake in the data, or a
            worse result. The model is as it was then.
    """
    began = time.monotonic()
    check_numbers(learning_rate, steps=steps)
    store, model = open_for_writing(model_path)
    entry = model.entry(task)
    start = continued(model, entry)
    spec = entry.fitted.task
    files = {"train": os.fspath(data), "valid": valid or spec.valid, "test": test or spec.test}
    fitted = replace(entry.fitted, task=replace(spec, **files))
    train, held_valid, held = _splits(model, fitted)
    judges = held_valid if len(held_valid) else train
    rate = learning_rate or model.config.train.learning_rate / SLOWER
    recipe = make_recipe(model.config, train, steps, rate, seed)
    was, before = _scores(start.sub, judges, held)
    own = own_part(start)
    with (
        TemporaryDirectory() as folder,
        Monitor(Path(folder), recipe.config.steps, quiet=quiet, console=console) as log,
    ):
        sub, _ = fit(start.sub, train, held_valid, recipe, log, trainable=own)
    (now, after), metric = _scores(sub, judges, held), metric_names(fitted)[0]
    said = f"{len(judges):,} {'validation' if len(held_valid) else 'training'} rows"
    if not force and not no_worse(metric, was, now):
        raise UserError(
            "The task would be worse than before on the same rows; nothing was committed.",
            where=f"task {task}, {metric} of {said}",
            expected=f"{was:.4g} or better",
            got=f"{now:.4g}",
            fix="give it the old rows as well, or more steps; or commit it all the same with --force",
        )
    whole, rows = take_apart(start, sub)
    old = card_of(model, task)
    notes = (
        f"{len(train):,} training rows of {data}; scored on {len(held):,} held rows, before and after",
        f"accepted by {said}: {metric} {was:.4g} before, {now:.4g} after",
    )
    card = Card(
        task,
        metric,
        after,
        {BEFORE: before},  # the baselines of before were scored on other rows
        time.monotonic() - began,
        own.count(sub.params),
        0,
        old.reused if old else (),
        notes,
    )
    moment = datetime.now(UTC).isoformat("T", "seconds")
    figures = {name: value for name, value in metrics_of(sub, held_valid).items() if np.isfinite(value)}
    made = {"valid": figures, "updated": [*entry.notes.get("updated", ()), moment]}
    ready = Updated(replace(entry, notes={**entry.notes, **made}), start.fresh, whole, rows, card)
    commit_update(store, model, ready)
    if not quiet:
        card.render(console)
    return card


def continued(model: Model, entry: TaskEntry) -> Start:
    """A task as it stands, ready to be trained on.

    Raises:
        UserError: it shares its norms or its gate with others, who would change with it.
    """
    own, pathway = private(entry.name), entry.pathway
    if (pathway.norms, pathway.gate) != (own, own):
        raise UserError(
            "This task shares its norms and gate with others, who would change with it.",
            where=f"{model.path}, task {entry.name}",
            expected="a task that was added or copied",
            got=f"norms {pathway.norms}, gate {pathway.gate}",
            fix="copy it first (`pathways copy`), and update the copy",
        )
    refuse_adding(model.config.model, model.path)
    owned_by_layer = pathway.owned or tuple({} for _ in model.routed_layers)
    layers = zip(owned_by_layer, freed_experts(model, entry.name), strict=True)
    fresh = tuple(
        {k: tuple(i for i in v if i in alone.get(k, ())) for k, v in owned.items()} for owned, alone in layers
    )
    fresh = tuple({kind: index for kind, index in layer.items() if index} for layer in fresh)
    copied = model.copied(pathway.encoders)
    return Start(Model(model.path, model.view).submodel(entry.name), model.gate(pathway.gate), fresh, (), copied, ())


def _splits(model: Model, fitted: FittedTask) -> tuple[EncodedSplit, EncodedSplit, EncodedSplit]:
    """Rows to train on, to choose by, and to score on."""
    folder, settings = cache_folder() / "encoded", model.config.encoders
    train, valid, test = (
        encode_tasks([fitted], split, model.tokenizer, settings, folder)[0] for split in ("train", "valid", "test")
    )
    if not len(train):
        raise UserError("No usable rows are left to train on.", where=f"task {fitted.task.name}: {fitted.task.train}")
    return train, valid, test if len(test) else valid if len(valid) else train


def _scores(sub: SubModel, judges: EncodedSplit, held: EncodedSplit) -> tuple[float, float]:
    """The chief metric on the rows to choose by, and on those to score on."""
    found = metric_of(sub, judges)
    return found, found if held is judges else metric_of(sub, held)


def no_worse(metric: str, before: float, after: float) -> bool:
    """Whether a score is at least as good as another; a score that is no number is worse than any."""
    if not np.isfinite(after):
        return not np.isfinite(before)
    return not np.isfinite(before) or (after <= before if metric in LOWER_IS_BETTER else after >= before)


def commit_update(store: Store, model: Model, ready: Updated) -> Version:
    """Commits a task's own components anew, all others checked as when a task is added.

    Raises:
        UserError: another task would change, or somebody else committed meanwhile. Nothing is written then.
    """
    task = ready.entry.name
    rows: dict[str, Any] = {}
    places = dict(zip((f"layer{i}" for i in model.routed_layers), ready.fresh, strict=True))
    for name, values in ready.rows.items():
        _, layer, kind, _ = name.split("/")
        rows[name] = (np.array(places[layer][kind]), values)
    documents = {f"tasks/{task}": task_document(ready.entry), f"cards/{task}": json.loads(ready.card.to_json())}
    changes = Changes(put=dict(ready.whole), put_rows=rows, documents=documents)
    own = private(task)
    allowed = Allowed(
        changed=frozenset(own_names(model, ready.entry)),
        rows={f"{layer}/{kind}": index for layer, kinds in places.items() for kind, index in kinds.items()},
        groups=frozenset({(own, own)}),
    )
    protect = check(model, allowed, first=ready.entry.pathway.parents)
    return store.commit(changes, f"updated task {task}", row_chunked=row_chunked, check=protect)
