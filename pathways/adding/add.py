"""Adding a task to a model: search, train what is new, measure, check the old tasks, commit.

The whole in one line each: `search` ranks experts, `pathways.search` finds the pathway and trains it, `baselines` says
what it is worth, `protect` guards the old tasks, `commit` writes.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pathways.adding import baselines
from pathways.adding.commit import Trained, commit, fingerprint, new_parameters, take_apart
from pathways.adding.fit import Recipe, metric_of, metrics_of, own_part
from pathways.adding.protect import make_probe
from pathways.adding.request import Say, Splits, Wanted, make_ready, near_words
from pathways.adding.search import Choice
from pathways.adding.start import Start
from pathways.data import subset
from pathways.evaluation import Sum, record
from pathways.model import Model
from pathways.monitor import Monitor
from pathways.predictions import predict_examples
from pathways.profile import PROFILE_ROWS, profiles
from pathways.report import Card, Reused
from pathways.search.arena import Arena
from pathways.search.find import Effort, Found, Method, Search, Tried
from pathways.submodel import SubModel, initial_submodel
from tasks.cache import EncodedSplit
from tasks.encoded import Example
from tasks.errors import UserError
from tasks.fitted import FittedTask
from tasks.metrics import metric_names
from tasks.spec import Task

if TYPE_CHECKING:
    from rich.console import Console

PROBE_EXAMPLES = 4
"""Examples of the new task kept in the model, by which later commits are checked."""


def add_task(
    model_path: str | os.PathLike[str],
    task: Task,
    *,
    new_experts: int = 2,
    candidates: int = 8,
    own_encoder: bool = True,
    steps: int | None = None,
    learning_rate: float | None = None,
    search: Method = "evolution",
    effort: Effort = "medium",
    max_parameters: int | None = None,
    seed: int = 0,
    quiet: bool = False,
    console: Console | None = None,
) -> Card:
    """Adds a task to a model without touching what its other tasks use, and commits a new version.

    Args:
        new_experts: own experts, copied or fresh, that a routed layer may get; 0 reuses only.
        candidates: experts per routed layer taken from those that exist; at least the gate's `top_k`.
        own_encoder: let the search train a copy of what the task's rows touch of the encoders (the embeddings of its
            words, ...); without, the shared ones as they are.
        steps: optimizer steps of a fine-tuning; by default about 10 epochs, from 100 to 800.
        learning_rate: the peak; by default the model's own.
        search: how candidates are chosen: `none`, `evolution` or `reinforce`.
        effort: how many are tried: `low`, `medium` or `high`.
        max_parameters: the most parameters that are the task's own.
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
    wanted = Wanted(new_experts, candidates, own_encoder, steps, learning_rate, search, effort, max_parameters, seed)
    ready = make_ready(model_path, task, wanted, say)
    model, fitted, splits, recipe = ready.model, ready.fitted, ready.splits, ready.recipe
    ground, choice, folds, borrowed = ready.ground, ready.ground.choice, ready.folds, ready.ground.reference
    say(ready.plan)
    with _monitor(model.path, task.name, ready.most_steps, quiet, console) as monitor:
        arena = Arena(ground.start, recipe, monitor)
        found = Search(ground, arena, folds, ready.options, _teller(say)).run()
    start, sub = found.start, found.start.sub
    digests = fingerprint(model.view, start.borrowed)
    trainable = own_part(start).count(sub.params)
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
        _still_reused(start, choice),
        _notes(start, splits, choice, found),
    )
    sample = [splits.train.example(i) for i in subset(splits.train, PROFILE_ROWS)]
    entry = replace(start.entry, notes=_task_notes(sub, sample, choice, found, splits.valid))
    probe = make_probe(sub, {task.name: sample[:PROBE_EXAMPLES]})
    trained = Trained(entry, start.gate, start.fresh, start.copied, whole, rows, digests, card, probe)
    version, _ = commit(model_path, trained, start.borrowed, seed)
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
    sub: SubModel, sample: list[Example], choice: Choice, found: Found, valid: EncodedSplit
) -> dict[str, Any]:
    """Notes kept with the task. The profile's usage is its own after training; its embedding that of the reference,
    so that the embeddings of all tasks are of one kind."""
    usage = profiles(sub, {sub.names[0]: sample})[sub.names[0]]["usage"]
    return {
        "valid": {name: value for name, value in metrics_of(sub, valid).items() if math.isfinite(value)},
        "profile": {"embedding": list(choice.embedding), "usage": usage},
        "steps": found.steps,
        "search": {
            "why": found.why,
            "pathway": found.genotype.to_json(),
            "copies": [list(slots) for slots in found.copies],
            "whole": found.whole,
            "tried": [asdict(one) for one in found.tried],
        },
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _teller(say: Say) -> Callable[[Tried], None]:
    """Prints each candidate as it has been tried."""

    def tell(one: Tried) -> None:
        note = f"  {one.note}" if one.note else ""
        say(f"  {one.stage:<10} {one.score:8.4f}  {one.parameters / 1e3:6.0f}K  {one.candidate}{note}")

    return tell


def _still_reused(start: Start, choice: Choice) -> tuple[Reused, ...]:
    """Of the candidate experts those that the pathway kept."""
    layers = dict(zip(start.sub.config.model.routed_layers, start.gate.candidates, strict=True))
    return tuple(one for one in choice.reused if one.expert in layers[one.layer].get(one.kind, ()))


def _notes(start: Start, splits: Splits, choice: Choice, found: Found) -> tuple[str, ...]:
    rows = f"{len(splits.train):,} training rows; scored on {len(splits.held):,} rows of {splits.held_name}"
    cost = f"{found.steps / found.whole:.1f} fine-tunings" if found.steps else "no training step"
    notes = [rows, near_words(choice), f"pathway {found.genotype}: {found.why}; the search cost {cost}"]
    if splits.held_name != "test":
        notes.append(f"no test rows: the score is on {splits.held_name} rows and may flatter all but the constant")
    notes += [
        f"the model had no {stream} encoder: a fresh one was trained and is shared" for stream in start.made_encoders
    ]
    unseen = sum(splits.held.unseen.values())
    if unseen:
        notes.append(f"{unseen} labels of the {splits.held_name} rows were never seen in training; they are left out")
    return tuple(notes)
