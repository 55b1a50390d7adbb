"""Adding a task to a model: search, train what is new, measure, check the old tasks, commit.

The whole in one line each: `search` chooses experts, `start` lays out the sub-model, `fit` trains it, `baselines` says
what it is worth, `protect` guards the old tasks, `commit` writes.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pathways.adding import baselines
from pathways.adding.commit import Trained, commit, fingerprint, new_parameters, take_apart
from pathways.adding.fit import (
    Recipe,
    fit,
    make_recipe,
    metric_of,
    metrics_of,
    own_part,
)
from pathways.adding.protect import make_probe
from pathways.adding.search import Choice, choose, reference
from pathways.adding.start import Start, prepare, reference_submodel, touched
from pathways.convolution import refuse_adding
from pathways.data import Data, cache_folder, encode_tasks, fit_tasks, streams_of, subset
from pathways.evaluation import Sum, record
from pathways.model import Model, open_for_writing
from pathways.monitor import Monitor
from pathways.predictions import predict_examples
from pathways.profile import PROFILE_ROWS, profiles
from pathways.report import Card
from pathways.submodel import SubModel, initial_submodel
from pathways.training.loop import Progress
from tasks.cache import EncodedSplit
from tasks.check import check_name
from tasks.encoded import Example
from tasks.errors import UserError
from tasks.fitted import FittedTask
from tasks.metrics import metric_names
from tasks.spec import Task

if TYPE_CHECKING:
    from rich.console import Console

PROBE_EXAMPLES = 4
"""Examples of the new task kept in the model, by which later commits are checked."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Splits:
    """The new task's encoded rows; `held` are those it is scored on, and `held_name` the split they come from."""

    train: EncodedSplit
    valid: EncodedSplit
    held: EncodedSplit
    held_name: str


def add_task(
    model_path: str | os.PathLike[str],
    task: Task,
    *,
    new_experts: int = 2,
    candidates: int = 8,
    own_encoder: bool = True,
    steps: int | None = None,
    learning_rate: float | None = None,
    seed: int = 0,
    quiet: bool = False,
    console: Console | None = None,
) -> Card:
    """Adds a task to a model without touching what its other tasks use, and commits a new version.

    Args:
        new_experts: fresh experts per routed layer; 0 reuses only.
        candidates: experts per routed layer taken from those that exist; at least the gate's `top_k`.
        own_encoder: train a copy of what the task's rows touch of the encoders (the embeddings of its words, ...);
            without, the shared ones as they are.
        steps: optimizer steps; by default about 10 epochs, from 100 to 800.
        learning_rate: the peak; by default the model's own.
        seed: of the search's sample, fresh parameters and the order of data.
        quiet: print nothing.

    Returns:
        The card: the score against three baselines, the cost, the experts reused. It is stored with the task.

    Raises:
        UserError: no model there, a name that is taken or not a name, a mistake in the data, a full disk, or an old
            task that would have changed. The model is as it was then.
    """
    began = time.monotonic()
    say = _speaker(quiet, console)
    _, model = open_for_writing(model_path)
    refuse_adding(model.config.model, model.path)
    _check_request(model, task, new_experts, candidates, steps, learning_rate)
    fitted, splits = _data(model, task, say)
    recipe = make_recipe(model.config, splits.train, steps, learning_rate, seed)
    borrowed = reference_submodel(model, fitted, streams_of(fitted), reference(model), seed)
    choice = choose(model, borrowed, splits.train, per_layer=candidates, seed=seed)
    say(_found(choice))
    copied = touched(model, splits.train) if own_encoder else {}
    start = prepare(model, borrowed, choice, new_experts, seed, copied)
    digests = fingerprint(model.view, start.borrowed)
    own = own_part(start)
    trainable = own.count(start.sub.params)
    say(_plan(start, recipe, trainable))
    with _monitor(model.path, task.name, recipe.config.steps, quiet, console) as monitor:
        sub, progress = fit(start.sub, splits.train, splits.valid, recipe, monitor, trainable=own)
    whole, rows = take_apart(start, sub)
    value = metric_of(sub, splits.held)
    say("measuring the baselines")
    scores = _baselines(start, borrowed, fitted, splits, recipe)
    card = Card(
        task.name,
        metric_names(fitted)[0],
        value,
        scores,
        time.monotonic() - began,
        trainable,
        new_parameters(whole, rows),
        choice.reused,
        _notes(start, splits, choice),
    )
    sample = [splits.train.example(i) for i in subset(splits.train, PROFILE_ROWS)]
    entry = replace(start.entry, notes=_task_notes(sub, sample, choice, progress, splits.valid))
    probe = make_probe(sub, {task.name: sample[:PROBE_EXAMPLES]})
    ready = Trained(entry, start.gate, start.fresh, copied, whole, rows, digests, card, probe)
    version, _ = commit(model_path, ready, start.borrowed, seed)
    _record_routing(model_path, task.name, sample)
    say(f"committed version {version.number}; old tasks checked: bytes and logits are what they were")
    if not quiet:
        card.render(console)
    return card


def _record_routing(path: str | os.PathLike[str], name: str, sample: list[Example]) -> None:
    """Counts a sample of the training rows, so that the statistics know the new task and its experts.

    The task is committed by now: whatever goes wrong here is a warning.
    """
    try:
        model = Model.open(path)
        sub, total = model.submodel(name), Sum()
        predict_examples(sub, {name: sample}, counted=total)
        record(model, [(sub, total.total)], "train")
    except (OSError, ValueError, UserError) as error:
        warnings.warn(f"routing statistics of {name} were not recorded: {error}", stacklevel=3)


def _speaker(quiet: bool, console: Console | None) -> Say:
    """Prints lines as the progress bar does: on standard error unless a console is given."""
    if quiet:
        return lambda line: None
    from rich.console import Console

    out = console or Console(stderr=True)
    return lambda line: out.print(line, markup=False, highlight=False, soft_wrap=True)


def _check_request(
    model: Model, task: Task, new_experts: int, candidates: int, steps: int | None, learning_rate: float | None
) -> None:
    """What can be seen before any work is done."""
    check_name(task.name)
    if task.name in model.tasks:
        raise UserError(
            "The model has a task of this name already.",
            where=model.path,
            got=task.name,
            fix="choose another name, or remove the old task first: `pathways remove`",
        )
    if task.each is not None:
        raise UserError(
            "A family of tasks cannot be added at once.",
            where=f"task {task.name}",
            got=f"each = {task.each!r}",
            fix="add its tasks one by one, with `where`",
        )
    least = {"new_experts": (new_experts, 0), "candidates": (candidates, 1), "steps": (steps, 1)}
    for name, (given, smallest) in least.items():
        if given is not None and given < smallest:
            raise UserError("A number is too small.", where=name, expected=f"at least {smallest}", got=str(given))
    if learning_rate is not None and not 0 < learning_rate < math.inf:
        raise UserError("The learning rate must be positive.", where="learning_rate", got=str(learning_rate))
    if "://" not in model.path and not os.access(model.path, os.W_OK):
        raise UserError("The model's folder cannot be written.", where=model.path, fix="check its owner and mode")


@contextmanager
def _monitor(path: str, name: str, steps: int, quiet: bool, console: Console | None) -> Iterator[Monitor]:
    """Logs in the model's folder, `adding/<task>`; those of a remote model are not kept."""
    with TemporaryDirectory() as spare:
        folder = Path(spare) if "://" in path else Path(path) / "adding" / name
        try:
            monitor = Monitor(folder, steps, quiet=quiet, console=console)
        except OSError as error:
            raise UserError("The logs cannot be written.", where=str(folder), got=str(error)) from None
        with monitor:
            yield monitor


def _data(model: Model, task: Task, say: Say) -> tuple[FittedTask, Splits]:
    fitted = fit_tasks([task], say)[0]
    folder, settings = cache_folder() / "encoded", model.config.encoders
    train, valid, test = (
        encode_tasks([fitted], split, model.tokenizer, settings, folder)[0] for split in ("train", "valid", "test")
    )
    for line in Data((train,), (valid,)).warnings([task.name]):
        say(line)
    if not len(train):
        raise UserError("No usable rows are left to train on.", where=f"task {task.name}: {task.train}")
    held, name = (test, "test") if len(test) else (valid, "valid") if len(valid) else (train, "train")
    return fitted, Splits(train, valid, held, name)


def _baselines(
    start: Start, borrowed: SubModel, fitted: FittedTask, splits: Splits, recipe: Recipe
) -> dict[str, float]:
    sub = start.sub
    scratch = initial_submodel(sub.config, sub.entries, sub.layout, sub.tokenizer, recipe.config.seed)
    return {
        baselines.CONSTANT: baselines.constant(fitted, splits.held),
        baselines.PROBE: baselines.probe(borrowed, splits.train, splits.held, recipe, splits.valid),
        baselines.SCRATCH: baselines.scratch(scratch, splits.train, splits.valid, splits.held, recipe),
    }


def _task_notes(
    sub: SubModel, sample: list[Example], choice: Choice, progress: Progress, valid: EncodedSplit
) -> dict[str, Any]:
    """Notes kept with the task. The profile's usage is its own after training; its embedding that of the reference,
    so that the embeddings of all tasks are of one kind."""
    usage = profiles(sub, {sub.names[0]: sample})[sub.names[0]]["usage"]
    return {
        "valid": {name: value for name, value in metrics_of(sub, valid).items() if math.isfinite(value)},
        "profile": {"embedding": list(choice.embedding), "usage": usage},
        "steps": progress.best_step,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _found(choice: Choice) -> str:
    near = ", ".join(f"{n} ({s:.2f})" for n, s in zip(choice.nearest, choice.similarity, strict=True))
    return f"nearest tasks: {near}" if near else "no task is near: experts are chosen by the new task's own gate scores"


def _plan(start: Start, recipe: Recipe, trainable: int) -> str:
    layers = len(start.fresh)
    reused = sum(len(index) for layer in start.gate.candidates for index in layer.values())
    fresh = sum(len(index) for layer in start.fresh for index in layer.values())
    config = recipe.config
    return (
        f"{reused - fresh} experts reused and {fresh} new in {layers} layers; {trainable / 1e6:.3g}M parameters to "
        f"train, at most {config.steps} steps of {config.rows} packed rows, learning rate {config.learning_rate:g}"
    )


def _notes(start: Start, splits: Splits, choice: Choice) -> tuple[str, ...]:
    rows = f"{len(splits.train):,} training rows; scored on {len(splits.held):,} rows of {splits.held_name}"
    notes = [rows, _found(choice)]
    if splits.held_name != "test":
        notes.append(f"no test rows: the score is on {splits.held_name} rows and may flatter all but the constant")
    notes += [
        f"the model had no {stream} encoder: a fresh one was trained and is shared" for stream in start.made_encoders
    ]
    unseen = sum(splits.held.unseen.values())
    if unseen:
        notes.append(f"{unseen} labels of the {splits.held_name} rows were never seen in training; they are left out")
    return tuple(notes)
