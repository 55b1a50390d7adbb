"""Training one task in a sub-model: only what is its own moves.

A network's bank holds borrowed and fresh experts in one array, and a table of an encoder shared and copied rows: only
the task's own rows are given to the optimizer, so that the others stay as they were, bit for bit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from pathways.adding.start import Start
from pathways.assemble import from_layers
from pathways.config import Config, TrainConfig
from pathways.data import subset
from pathways.monitor import Monitor
from pathways.pathway import ADAPTER_LEAVES
from pathways.predictions import predict_examples
from pathways.quality import Chosen, figures, metric_values, quality
from pathways.submodel import SubModel
from pathways.training.loop import Hooks, Interrupted, Progress
from pathways.training.loop import train as run_loop
from pathways.training.optimizer import make_optimizer, make_schedule, names
from pathways.training.step import initial_state, make_step
from pathways.training.trainable import EVERYTHING, Names, Trainable
from tasks.batch import BatchShape
from tasks.cache import EncodedSplit
from tasks.errors import UserError
from tasks.metrics import example_losses, metric_names
from tasks.pack import shape_for
from tasks.pipeline import TrainStream

EPOCHS, LEAST_STEPS, MOST_STEPS = 10, 100, 800
MOST_ROWS = 8
"""Packed rows of a batch: small, so that a step is cheap on a laptop."""
BATCHES_OF_DATA = 8
"""Batches are made smaller until an epoch has about so many."""
HEAD_RATE = 3.0
"""Times the learning rate, for the head."""
VALIDATIONS, PATIENCE = 12, 8
OWN_OF_GATE = ("gate", "noise", *ADAPTER_LEAVES)
"""Arrays of a routed layer that train with a task's own gate; the balance bias moves by no gradient."""
LOSS_WEIGHT = 1e-3
"""Of the loss in what early stopping looks at: it decides between equal accuracies, which small splits often have."""


@dataclass(frozen=True)
class Recipe:
    """How a task is trained: the schedule, and the shape of its batches."""

    config: TrainConfig
    shape: BatchShape


def make_recipe(
    config: Config, train: EncodedSplit, steps: int | None, learning_rate: float | None, seed: int
) -> Recipe:
    """Sizes that suit the data: about 10 epochs, from 100 to 800 steps, of batches of at most 8 packed rows."""
    use, length = train.token_use(), config.encoders.max_length
    per_row = max(length / max(sum(use.mean.values()), 1.0), 1.0)
    rows = max(1, min(MOST_ROWS, config.train.rows, round(len(train) / BATCHES_OF_DATA / per_row)))
    shape = shape_for([use], [1.0], rows, length, config.encoders)
    epoch = len(train) / (rows * per_row)
    steps = steps or max(LEAST_STEPS, min(MOST_STEPS, math.ceil(EPOCHS * epoch)))
    made = replace(
        config.train,
        steps=steps,
        rows=rows,
        accumulate=1,
        learning_rate=learning_rate or config.train.learning_rate,
        schedule="one_cycle",
        seed=seed,
        eval_every=max(steps // VALIDATIONS, 1),
        patience=PATIENCE,
        checkpoint_every=0,
        statistics=False,
    )
    return Recipe(made, shape)


def own_part(start: Start) -> Trainable:
    """What of the network belongs to the new task: of banks the fresh experts, of tables the copied rows."""
    flat: dict[tuple[Any, ...], np.ndarray] = {}
    routed = start.sub.config.model.routed_layers
    kinds = {kind for layer in start.fresh for kind in layer}
    for path in start.sub.flat():
        if path[0] == "encoders" and (copied := start.copied.get("/".join(path[1:]))) is not None:
            flat[path] = np.array(copied, np.int64)
        elif "banks" in path and (kind := path[path.index("banks") + 1]) in kinds:
            layer = routed.index(path[1])
            bank = start.sub.layout.experts[layer][kind]
            flat[path] = np.flatnonzero(np.isin(bank, start.fresh[layer].get(kind, ())))
    found = jax.tree_util.tree_flatten_with_path(from_layers(flat, start.sub.config.model))[0]
    rows = {names(path): index for path, index in found}

    def own(path: Names) -> bool:
        if head_leaves(path) or path[0] == "task_embedding" or path in rows:
            return True
        if path[0] == "encoders":
            return path[1] in start.made_encoders or "/".join(path[1:]) in start.copied
        return (path[-1] == "scale" and "banks" not in path) or (path[-2:-1] == ("routed",) and path[-1] in OWN_OF_GATE)

    return Trainable(own, rows)


def head_leaves(path: Names) -> bool:
    """Which leaves are heads."""
    return path[0] in ("heads", "token_heads", "taps")


def fit(
    sub: SubModel,
    train: EncodedSplit,
    valid: EncodedSplit,
    recipe: Recipe,
    monitor: Monitor,
    *,
    trainable: Trainable = EVERYTHING,
) -> tuple[SubModel, Progress]:
    """Trains a sub-model of one task and leaves the best parameters on validation in it.

    Args:
        trainable: what trains; all by default.

    Raises:
        UserError: it was stopped by a signal, or diverged.
    """
    config = recipe.config
    schedule = make_schedule(config)
    rate_of = lambda path: HEAD_RATE if head_leaves(path) else 1.0  # noqa: E731
    optimizer = make_optimizer(config, schedule, rate_of)
    step = make_step(sub, optimizer, sub.config.balance, seed=config.seed, statistics=False, trainable=trainable)
    state = initial_state(sub, optimizer, statistics=False, trainable=trainable)
    held = Chosen(valid, subset(valid, config.eval_rows))
    hooks = Hooks(_validator(held), lambda step, counts: None, lambda batch: sub.names[0])
    stream = TrainStream([train], [1.0], recipe.shape, config.seed)
    try:
        return run_loop(sub, step, state, config, hooks, monitor, lambda position: stream, None, jax.jit(schedule))
    except Interrupted as stop:
        raise UserError(
            "Stopped before the new task was committed; the model is as it was.", where=f"after step {stop.step}"
        ) from None
    finally:
        stream.close()


def _validator(held: Chosen) -> Callable[[SubModel], dict[str, float]]:
    later = itertools.count()

    def validate(sub: SubModel) -> dict[str, float]:
        if not held:
            # Nothing to look at: each look counts as better, so that the last parameters are taken.
            return {"quality": float(next(later))}
        fitted, found = sub.entries[0].fitted, predict_examples(sub, {sub.names[0]: held})[sub.names[0]]
        value = quality(fitted, found, held)
        values, targets = metric_values(fitted, found, held)
        loss = float(np.mean(example_losses(fitted, values, targets, found.mask)))
        return {"quality": (value if np.isfinite(value) else -1.0) - LOSS_WEIGHT * loss / (1 + loss), "loss": loss}

    return validate


def metrics_of(sub: SubModel, split: EncodedSplit) -> dict[str, float]:
    """The task's metrics on all rows of a split; none for an empty one."""
    fitted, task = sub.entries[0].fitted, sub.names[0]
    if not len(split):
        return {}
    rows = Chosen(split, range(len(split)))
    return figures(fitted, predict_examples(sub, {task: rows})[task], examples=rows)


def metric_of(sub: SubModel, split: EncodedSplit) -> float:
    """The chief one of them."""
    return metrics_of(sub, split)[metric_names(sub.entries[0].fitted)[0]]
