"""How much a model doubts its answer for a row: 0 where it is certain, 1 where it cannot tell.

Axis letters: n rows, C classes or labels, W words of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tasks.fitted import FittedTask
from tasks.metrics import THRESHOLD

DOUBTABLE = ("classification", "multilabel", "tagging")
"""Kinds of target whose predictions tell a doubt. A number has no probability, and a predicted distribution with equal
shares may well be a certain one."""


def margin_doubt(probabilities: np.ndarray) -> np.ndarray:
    """1 less the margin between the two most likely classes (Scheffer et al. 2001): `[n, C]` to `[n]`."""
    if probabilities.shape[-1] < 2:
        return np.zeros(probabilities.shape[:-1])
    best = np.partition(probabilities, -2, axis=-1)
    return 1.0 - (best[..., -1] - best[..., -2])


def label_doubt(probabilities: np.ndarray) -> np.ndarray:
    """The mean entropy of the labels, each of them held or not, in bits: `[n, C]` to `[n]`."""
    p = np.clip(probabilities, 1e-12, 1.0 - 1e-12)
    return np.mean(-p * np.log2(p) - (1.0 - p) * np.log2(1.0 - p), axis=-1)


def word_doubt(probabilities: Sequence[np.ndarray]) -> np.ndarray:
    """The mean over the words of a row of `margin_doubt`: n of `[W, C]` to `[n]`; 0 for a row without words."""
    return np.array([float(margin_doubt(row).mean()) if len(row) else 0.0 for row in probabilities], np.float64)


def doubt(fitted: FittedTask, values: Any) -> np.ndarray | None:
    """`[n]` of what `predict_examples` said of n rows; None for a kind that is not in `DOUBTABLE`."""
    kind = fitted.task.target.kind
    if kind == "classification":
        return margin_doubt(values)
    if kind == "multilabel":
        return label_doubt(values)
    return word_doubt(values) if kind == "tagging" else None


def answers(fitted: FittedTask, values: Any) -> list[Any]:
    """For each of n rows what the model would say: a class, its labels, its tags, or its numbers (one is bare)."""
    kind, classes = fitted.task.target.kind, fitted.classes
    if kind == "regression":
        return [row[0] if len(row) == 1 else row for row in np.asarray(values, np.float64).tolist()]
    if kind == "multilabel":
        return [[name for name, p in zip(classes, row, strict=True) if p >= THRESHOLD] for row in values]
    if kind == "tagging":
        return [[classes[int(i)] for i in row.argmax(axis=-1)] for row in values]
    return [classes[int(i)] for i in values.argmax(axis=-1)]


def sureness(fitted: FittedTask, values: Any) -> list[float | None]:
    """The probability of each answer; of the least certain label or word where it has several; None of a number."""
    kind = fitted.task.target.kind
    if kind == "regression":
        return [None] * len(values)
    if kind == "multilabel":
        return np.maximum(values, 1.0 - values).min(axis=-1).tolist()
    if kind == "tagging":
        return [float(row.max(axis=-1).min()) if len(row) else None for row in values]
    return values.max(axis=-1).tolist()
