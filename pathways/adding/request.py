"""What is asked for when a task is added, and what is laid out before anything is trained."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pathways.adding.fit import Recipe, make_recipe
from pathways.adding.search import Choice, choose, reference
from pathways.adding.start import reference_submodel, touched
from pathways.convolution import refuse_adding
from pathways.data import Data, cache_folder, encode_tasks, fit_tasks, streams_of
from pathways.model import Model, open_for_writing
from pathways.report import count, duration
from pathways.search.arena import Arena
from pathways.search.find import EFFORTS, METHODS, Effort, Method, Options, Search, budget
from pathways.search.folds import FOLDS, Folds
from pathways.search.ground import ROOT, Ground, make_ground
from tasks.cache import EncodedSplit
from tasks.check import check_name
from tasks.errors import UserError
from tasks.fitted import FittedTask
from tasks.spec import Task

LEAST = {"new_experts": 0, "candidates": 1, "steps": 1, "max_parameters": 1}
"""The smallest number that each of these options can be."""
ADAPTER_RANK = 8
TIMED_STEPS = 5

Say = Callable[[str], None]


@dataclass(frozen=True)
class Splits:
    """The new task's encoded rows; `held` are those it is scored on, and `held_name` the split they come from."""

    train: EncodedSplit
    valid: EncodedSplit
    held: EncodedSplit
    held_name: str


@dataclass(frozen=True)
class Wanted:
    """The options of `add_task`, which explains them."""

    new_experts: int = 2
    candidates: int = 8
    own_encoder: bool = True
    steps: int | None = None
    learning_rate: float | None = None
    search: Method = "evolution"
    effort: Effort = "medium"
    max_parameters: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Ready:
    """A new task before its search."""

    model: Model
    fitted: FittedTask
    splits: Splits
    recipe: Recipe
    ground: Ground
    folds: Folds
    options: Options

    @property
    def most_steps(self) -> int:
        """The budget of the search in optimizer steps."""
        return 1 if self.folds.tiny else round(budget(self.options, self.folds.few) * self.recipe.config.steps)

    @property
    def plan(self) -> str:
        """In a sentence or two."""
        folds, config = self.folds, self.recipe.config
        if folds.tiny:
            return (
                f"{len(folds.rows):,} labelled rows are too few to train on: only the head and its pathway are chosen"
            )
        judges = f"{FOLDS} folds of {len(folds.rows):,} rows" if folds.few else f"{len(folds.folds[0].held):,} rows"
        return (
            f"search: {self.options.method}, {self.options.effort} effort, judged by {judges}; a fine-tuning has "
            f"{config.steps} steps of {config.rows} packed rows, learning rate {config.learning_rate:g}; at most "
            f"{self.most_steps:,} steps in all"
        )


def make_ready(path: str | os.PathLike[str], task: Task, wanted: Wanted, say: Say) -> Ready:
    """Reads the data, ranks experts and lays out the network of all candidates.

    Raises:
        UserError: as `add_task`.
    """
    _, model = open_for_writing(path)
    refuse_adding(model.config.model, model.path)
    _check_request(model, task, wanted)
    options = _options(wanted)
    fitted, splits = _data(model, task, say)
    recipe = make_recipe(model.config, splits.train, wanted.steps, wanted.learning_rate, wanted.seed)
    root = reference(model)
    borrowed = reference_submodel(model, fitted, streams_of(fitted), root, wanted.seed)
    choice = choose(model, borrowed, splits.train, per_layer=wanted.candidates, seed=wanted.seed)
    say(near_words(choice))
    copied = touched(model, splits.train) if wanted.own_encoder else {}
    users = sum(count for (norms, gate, _), count in model.catalogue.shared.items() if (norms, gate) == root)
    extent = {"new_experts": wanted.new_experts, "rank": ADAPTER_RANK, "users": users, "seed": wanted.seed}
    ground = make_ground(model, borrowed, choice, copied, **extent)
    folds = Folds(fitted, splits.train, splits.valid, model.config.train.eval_rows, wanted.seed)
    # Refuses a limit that no candidate keeps, before anything is trained.
    Search(ground, Arena(ground.start, recipe), folds, options).plain(ROOT)
    return Ready(model, fitted, splits, recipe, ground, folds, options)


def plan_task(path: str | os.PathLike[str], task: Task, *, say: Say = lambda line: None, **options: Any) -> list[str]:
    """What `add_task` with the same options would do, and what it would cost; nothing is written.

    A few steps are run, so the times are of this machine; compiling and the three baselines come on top.

    Raises:
        UserError: as `add_task`.
    """
    ready = make_ready(path, task, Wanted(**options), say)
    lines = [ready.plan]
    search = Search(ready.ground, Arena(ready.ground.start, ready.recipe), ready.folds, ready.options)
    bases = ", ".join(ready.ground.bases)
    lines.append(f"pathways to start from: {bases}")
    if ready.folds.tiny:
        return lines
    for one in search.first(next(iter(ready.ground.bases))):
        lines.append(f"candidate {one}: {count(ready.ground.cost(one).private)} parameters of its own")
    fold, one = ready.folds.folds[0], search.space.plain("reuse")
    seconds = []
    for steps in (1, TIMED_STEPS):
        sub, rates = ready.ground.candidate(one), ready.ground.rates(one)
        began = time.monotonic()
        search.arena.train(sub, rates, fold.train, (), steps, [steps])
        seconds.append(time.monotonic() - began)
    whole = ready.most_steps * seconds[-1] / TIMED_STEPS
    return [*lines, f"compiling took {duration(seconds[0])}; the search would take at most {duration(whole)} of steps"]


def _check_request(model: Model, task: Task, wanted: Wanted) -> None:
    """What can be seen before any work is done."""
    check_name(task.name)
    if model.has(task.name):
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
    check_numbers(wanted.learning_rate, **{name: getattr(wanted, name) for name in LEAST})
    if "://" not in model.path and not os.access(model.path, os.W_OK):
        raise UserError("The model's folder cannot be written.", where=model.path, fix="check its owner and mode")


def check_numbers(learning_rate: float | None, **given: int | None) -> None:
    """Looks at the numbers that training is asked for with; None leaves one to the default.

    Args:
        given: of `LEAST`, those that there are.

    Raises:
        UserError: one that is too small.
    """
    for name, number in given.items():
        if number is not None and number < LEAST[name]:
            raise UserError("A number is too small.", where=name, expected=f"at least {LEAST[name]}", got=str(number))
    if learning_rate is not None and not 0 < learning_rate < math.inf:
        raise UserError("The learning rate must be positive.", where="learning_rate", got=str(learning_rate))


def _options(wanted: Wanted) -> Options:
    for where, given, known in (("search", wanted.search, METHODS), ("effort", wanted.effort, EFFORTS)):
        if given not in known:
            raise UserError("An unknown choice.", where=where, expected=" or ".join(known), got=given)
    return Options(wanted.search, wanted.effort, wanted.max_parameters)


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


def near_words(choice: Choice) -> str:
    """The nearest tasks in a line."""
    near = ", ".join(f"{n} ({s:.2f})" for n, s in zip(choice.nearest, choice.similarity, strict=True))
    return f"nearest tasks: {near}" if near else "no task is near: experts are chosen by the new task's own gate scores"
