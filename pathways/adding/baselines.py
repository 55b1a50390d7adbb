"""What a new task is measured against: the majority or mean, a linear probe on the frozen model, the same network
from scratch. Each gives the task's chief metric on the same rows.

Axis letters: n examples, D width, Y outputs of the task, C classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np

from pathways.adding.fit import Recipe, fit, head_leaves, metric_of
from pathways.data import subset
from pathways.monitor import Monitor
from pathways.predictions import packed, run_shape
from pathways.quality import Chosen, kept_words, word_classes
from pathways.submodel import SubModel
from pathways.training.trainable import Trainable
from tasks import metrics
from tasks.cache import EncodedSplit
from tasks.fitted import FittedTask
from tasks.target import decode_outputs

CONSTANT, PROBE, SCRATCH = "majority or mean", "linear probe on the frozen model", "same network from scratch"
PROBE_ROWS = 5000
"""Training rows of the linear probe, at most."""


def constant(fitted: FittedTask, split: EncodedSplit) -> float:
    """The most common class, the classes' shares or the mean of the training split, for every row."""
    name = metrics.metric_names(fitted)[0]
    if fitted.is_token_level:
        rows = Chosen(split, range(len(split)))
        share = np.array(fitted.class_counts)
        values, tags = word_classes(rows, [np.tile(share, (len(kept_words(row)), 1)) for row in rows])
        return metrics.compute(fitted, values, tags, None, (name,))[name]
    if fitted.task.target.kind == "regression":
        row = np.array(fitted.target_mean)
    else:
        known = fitted.known_counts if fitted.task.target.kind == "multilabel" else sum(fitted.class_counts)
        row = np.array(fitted.class_counts) / np.maximum(known, 1)
    return _score(fitted, name, np.tile(row, (len(split), 1)), split)


def probe(sub: SubModel, train: EncodedSplit, held: EncodedSplit, recipe: Recipe, valid: EncodedSplit) -> float:
    """A linear model on the pooled rows of the frozen reference pathway; for tagging, its head alone is trained.

    Args:
        sub: the reference pathway, holding the task alone.
        held: the rows it is scored on.
    """
    fitted = sub.entries[0].fitted
    if fitted.is_token_level:
        with silent(recipe) as monitor:
            trained, _ = fit(sub, train, valid, recipe, monitor, trainable=Trainable(head_leaves))
        return metric_of(trained, held)
    rows = subset(train, PROBE_ROWS)
    x, x_held = pooled(sub, train, rows), pooled(sub, held, range(len(held)))
    mean, std = x.mean(axis=0), x.std(axis=0) + 1e-6
    values = _linear(fitted, (x - mean) / std, train.y[rows], train.y_mask[rows], (x_held - mean) / std)
    return _score(fitted, metrics.metric_names(fitted)[0], values, held)


def scratch(sub: SubModel, train: EncodedSplit, valid: EncodedSplit, held: EncodedSplit, recipe: Recipe) -> float:
    """A fresh network of the same shape, all of it trained with the same steps on the same batches."""
    with silent(recipe) as monitor:
        trained, _ = fit(sub, train, valid, recipe, monitor)
    return metric_of(trained, held)


@contextmanager
def silent(recipe: Recipe) -> Iterator[Monitor]:
    """A monitor that shows nothing and leaves nothing behind."""
    with TemporaryDirectory() as folder, Monitor(Path(folder), recipe.config.steps, quiet=True) as monitor:
        yield monitor


def pooled(sub: SubModel, split: EncodedSplit, rows: Any) -> np.ndarray:
    """`[n, D]`: the mean of each example's rows after the last norm."""
    found = []
    for batch, held in packed(sub, run_shape(sub, split.streams), ((sub.names[0], split.example(i)) for i in rows)):
        # With statistics, because the search compiled that program already.
        out = sub.run(batch, statistics=True)
        found.append(np.asarray(jax.device_get(out.pooled))[: len(held)])
    return np.concatenate(found) if found else np.zeros((0, sub.pooled_width), np.float32)


def _linear(fitted: FittedTask, x: np.ndarray, y: np.ndarray, mask: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Predictions `[n, Y]` for the rows `held [n, D]`: probabilities, or values in the target's units."""
    from sklearn.exceptions import ConvergenceWarning

    if fitted.task.target.kind == "regression":
        columns = [_number(x, y[:, i], mask[:, i], held) for i in range(y.shape[1])]
        return decode_outputs(fitted, np.stack(columns, axis=1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        if fitted.task.target.kind == "multilabel":
            return np.stack([_label(x, y[:, i], mask[:, i], held) for i in range(y.shape[1])], axis=1)
        return _classes(x, y, held)


def _classes(x: np.ndarray, y: np.ndarray, held: np.ndarray) -> np.ndarray:
    """`[n, C]`: logistic regression on shares, each row counted once for each class with its share as weight; all of
    it for the only class where training has but one."""
    from sklearn.linear_model import LogisticRegression

    rows, classes = np.nonzero(y > 0)
    if len(np.unique(classes)) < 2:
        return np.tile(y.mean(axis=0), (len(held), 1))
    model = LogisticRegression(max_iter=300).fit(x[rows], classes, sample_weight=y[rows, classes])
    out = np.zeros((len(held), y.shape[1]))
    out[:, model.classes_] = model.predict_proba(held)
    return out


def _number(x: np.ndarray, y: np.ndarray, mask: np.ndarray, held: np.ndarray) -> np.ndarray:
    """`[n]`: one target column, in the units it is trained in; its mean, 0, where training knows no value of it."""
    from sklearn.linear_model import Ridge

    return _known(Ridge(1.0), x, y, mask).predict(held) if (mask > 0).any() else np.zeros(len(held))


def _label(x: np.ndarray, y: np.ndarray, mask: np.ndarray, held: np.ndarray) -> np.ndarray:
    """`[n]`: the probability of one label; its share where training has only one value of it."""
    from sklearn.linear_model import LogisticRegression

    known = mask > 0
    if len(np.unique(y[known])) < 2:
        return np.full(len(held), float(y[known].mean()) if known.any() else 0.0)
    return _known(LogisticRegression(max_iter=300), x, y, mask).predict_proba(held)[:, 1]


def _known(model: Any, x: np.ndarray, y: np.ndarray, mask: np.ndarray) -> Any:
    return model.fit(x[mask > 0], y[mask > 0])


def _score(fitted: FittedTask, name: str, values: np.ndarray, split: EncodedSplit) -> float:
    return metrics.compute(fitted, values, decode_outputs(fitted, split.y), split.y_mask, (name,))[name]
