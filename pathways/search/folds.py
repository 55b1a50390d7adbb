"""Which rows a candidate is trained on and which judge it, and when a difference between two is real.

Axis letters: n rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pathways.data import subset
from pathways.quality import Chosen
from tasks.cache import EncodedSplit
from tasks.encoded import Example
from tasks.fitted import FittedTask

FEW_ROWS, FEW_VALID = 400, 100
"""With fewer rows in all, or fewer of validation, candidates are judged by cross-validation over both."""
FOLDS = 3
TINY_CLASS, TINY_ROWS = 5, 20
"""With fewer examples a class, or rows of a regression, nothing is trained."""
DRAWS = 1000
LEVEL = 0.9
"""Of the two-sided interval whose lower bound must be above zero."""


@dataclass(frozen=True)
class Fold:
    """`train` and `held`, and where the rows of `train` stand in `Folds.rows`."""

    train: Sequence[Example]
    held: Sequence[Example]
    places: np.ndarray


@dataclass(frozen=True)
class Folds:
    """The rows of a new task as a search uses them.

    Attributes:
        fitted: the task.
        train, valid: its splits.
        seed: of the order.
    """

    fitted: FittedTask
    train: EncodedSplit
    valid: EncodedSplit
    eval_rows: int
    seed: int

    @property
    def few(self) -> bool:
        """Whether candidates are judged by cross-validation."""
        return len(self.train) + len(self.valid) < FEW_ROWS or len(self.valid) < min(FEW_VALID, len(self.train))

    @property
    def tiny(self) -> bool:
        """Whether there is too little to train anything but the head."""
        rows = len(self.train) + len(self.valid)
        kind = self.fitted.task.target.kind
        if kind in ("classification", "distribution", "multilabel"):
            return rows < TINY_CLASS * max(len(self.fitted.classes), 2 if kind != "multilabel" else 4)
        return rows < TINY_ROWS

    @cached_property
    def rows(self) -> Sequence[Example]:
        """All rows that may be learned from: training rows, and where they are few those of validation."""
        if not self.few:
            return Chosen(self.train, range(len(self.train)))
        return [split.example(i) for split in (self.train, self.valid) for i in range(len(split))]

    @cached_property
    def folds(self) -> tuple[Fold, ...]:
        """One, of training and validation rows; or several, each holding out a part of all rows."""
        if not self.few:
            held = Chosen(self.valid, subset(self.valid, self.eval_rows))
            return (Fold(self.rows, held, np.arange(len(self.rows))),)
        order = _spread(self.rows, self.fitted, np.random.default_rng([self.seed, 11]))
        found = []
        for part in range(FOLDS):
            held = order[part::FOLDS]
            places = np.setdiff1d(np.arange(len(self.rows)), held)
            found.append(Fold([self.rows[i] for i in places.tolist()], [self.rows[i] for i in held.tolist()], places))
        return tuple(found)


def _spread(rows: Sequence[Example], fitted: FittedTask, rng: np.random.Generator) -> np.ndarray:
    """An order in which every stride holds as much of each class, or of each range of values, as another."""
    order = rng.permutation(len(rows))
    if fitted.is_token_level:
        return order
    y = np.stack([rows[i].y for i in order.tolist()])
    key = y[:, 0] if fitted.task.target.kind == "regression" else y.argmax(axis=1)
    return order[np.argsort(key, kind="stable")]


def lower_bound(before: np.ndarray, after: np.ndarray, seed: int = 0) -> float:
    """The lower end of a paired bootstrap interval of the mean gain `before - after` of losses `[n]` (Efron 1979).

    Minus infinity of fewer than two rows.
    """
    gain = np.asarray(before, np.float64) - np.asarray(after, np.float64)
    if len(gain) < 2:
        return float("-inf")
    drawn = np.random.default_rng([seed, 13]).integers(len(gain), size=(DRAWS, len(gain)))
    return float(np.quantile(gain[drawn].mean(axis=1), (1 - LEVEL) / 2))
