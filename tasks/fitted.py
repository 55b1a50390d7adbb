"""What is learned from the training split before any training: classes, means, counts. One streaming pass.

Axis letters: Y outputs of the task's head.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from tasks.check import listing
from tasks.errors import UserError
from tasks.infer import check_columns, infer
from tasks.spec import Task
from tasks.splits import SPLITS, SplitName, open_split, rows_by_split, rows_by_value
from tasks.target_values import VALUES, flat_labels, holds_labels
from tasks.values import label_column, natural_order, number_column

MAX_CLASSES = 65_536
"""A classification target with more distinct values is a mistake."""


@dataclass(frozen=True)
class FittedTask:
    """A closed task and what its training split taught.

    Attributes:
        classes: labels, tags or class columns in the order of the outputs; empty for regression.
        class_counts: per class, the training rows (words for tagging; positives for multilabel; summed shares,
            rounded, for distribution).
        known_counts: per output, the training rows (or words) in which it is known.
        number_mean, number_std: of each number column, over its finite values; the deviation is 1 where it was 0.
        target_mean, target_std: per target column, regression only.
        train_rows, valid_rows, test_rows: rows of each split, with unusable targets counted too.
        dropped_rows: training rows whose target is missing or was skipped as bad.
        groups: values of the group column in the training split.
    """

    task: Task
    classes: tuple[str, ...] = ()
    class_counts: tuple[int, ...] = ()
    known_counts: tuple[int, ...] = ()
    number_mean: dict[str, float] = field(default_factory=dict)
    number_std: dict[str, float] = field(default_factory=dict)
    target_mean: tuple[float, ...] = ()
    target_std: tuple[float, ...] = ()
    train_rows: int = 0
    valid_rows: int = 0
    test_rows: int = 0
    dropped_rows: int = 0
    groups: tuple[str, ...] = ()

    @property
    def num_outputs(self) -> int:
        """Y: the width of the task's head."""
        return len(self.task.target.columns) if self.task.target.kind == "regression" else len(self.classes)

    @property
    def is_token_level(self) -> bool:
        """Whether the head answers for each word rather than for the example."""
        return self.task.target.kind == "tagging"

    @property
    def tokens_column(self) -> str:
        """The input whose words the tags of a tagging task belong to: its first text input."""
        return next(column.column for column in self.task.inputs if column.kind == "text")

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers; `from_json` gives an equal object back."""
        return msgspec.to_builtins(asdict(self))

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> FittedTask:
        """The inverse of `to_json`; a malformed document is a UserError."""
        try:
            return msgspec.convert(data, cls)
        except msgspec.ValidationError as error:
            raise UserError("this is not a fitted task", got=str(error)) from error


class Moments:
    """Mean and deviation of a stream in float64: Welford's update, batch by batch (Chan et al. 1983, eq. 2.1)."""

    def __init__(self) -> None:
        self.count, self.mean, self._squares = 0, 0.0, 0.0

    def update(self, values: np.ndarray) -> None:
        """Adds the finite ones of `[n]` values."""
        values = values[np.isfinite(values)]
        n = len(values)
        if n == 0:
            return
        mean = float(values.mean())
        delta = mean - self.mean
        total = self.count + n
        self._squares += float(((values - mean) ** 2).sum()) + delta**2 * self.count * n / total
        self.mean += delta * n / total
        self.count = total

    @property
    def std(self) -> float:
        """The population deviation; 1 where there is none, so that dividing by it is safe."""
        std = (self._squares / self.count) ** 0.5 if self.count else 0.0
        return std if std > 1e-12 * max(1.0, abs(self.mean)) else 1.0

    @property
    def varies(self) -> bool:
        return self.count > 0 and (self._squares / self.count) ** 0.5 > 1e-12 * max(1.0, abs(self.mean))


def fit(task: Task) -> FittedTask:
    """Learns from the training split and counts the others; infers what the task leaves open.

    Raises:
        UserError: no training rows, every target missing, one class only or one value only, a bad target value.
    """
    task = _closed(task)
    learner = _Learner(task)
    for split in SPLITS:
        _check_split_columns(task, split)
    for split, batch in rows_by_split(task, columns=learner.columns("train")):
        learner.update(split, batch)
    return learner.finish()


def fit_all(tasks: Sequence[Task]) -> list[FittedTask]:
    """As `fit` on each, but tasks that differ only in name and `where` value share one pass over their file."""
    closed = [_closed(task) for task in tasks]
    families: dict[Task, list[Task]] = {}
    for task in closed:
        if task.where is not None:
            families.setdefault(replace(task, name="-", where=(task.where[0], "")), []).append(task)
    fitted: dict[str, FittedTask] = {}
    for family in families.values():
        fitted.update(_fit_family(family))
    return [fitted[task.name] if task.name in fitted else fit(task) for task in closed]


def _fit_family(family: list[Task]) -> dict[str, FittedTask]:
    first = family[0]
    assert first.where is not None
    column = first.where[0]
    learners: dict[str, list[_Learner]] = {}
    for task in family:
        assert task.where is not None
        learners.setdefault(task.where[1], []).append(_Learner(task))
    for split in SPLITS:
        _check_split_columns(first, split)
        learner = next(iter(learners.values()))[0]
        needed = learner.columns(split)
        numbers = [name for name in learner.numbers if name in needed and name != column]
        for value, batch in rows_by_value(first, split, column, columns=needed, numbers=numbers):
            for learner in learners.get(value, ()):
                learner.update(split, batch)
    return {learner.task.name: learner.finish() for group in learners.values() for learner in group}


def _closed(task: Task) -> Task:
    if task.each is not None:
        raise UserError(
            "a task with `each` stands for many",
            where=f"task {task.name}",
            fix="expand it first: tasks.registry.expand",
        )
    is_open = task.target.kind is None or not task.inputs or any(column.kind is None for column in task.inputs)
    return infer(task)[0] if is_open else task


def _check_split_columns(task: Task, split: SplitName) -> None:
    if split == "train" or getattr(task, split) is not None:
        check_columns(replace(task, train=getattr(task, split)), open_split(task, split).columns)


class _Learner:
    """The sums of one task's pass over its training split."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.rows = dict.fromkeys(SPLITS, 0)
        self._counts: Counter[str] = Counter()
        self._known = np.zeros(len(task.target.columns), np.int64)
        self._sums = np.zeros(len(task.target.columns), np.float64)
        self._usable = 0
        self.numbers = {column.column: Moments() for column in task.inputs if column.kind == "number"}
        self._targets = [Moments() for _ in task.target.columns]
        self._groups: set[str] = set()

    def columns(self, split: SplitName) -> list[str]:
        """What the pass over a split has to read."""
        if split != "train":
            return [self.task.target.columns[0]]
        group = [self.task.group] if self.task.group else []
        return list(dict.fromkeys([*self.task.target.columns, *self.numbers, *group]))

    def update(self, split: SplitName, batch: pa.RecordBatch) -> None:
        self.rows[split] += batch.num_rows
        if split != "train":
            return
        for name, moments in self.numbers.items():
            moments.update(number_column(batch.column(name)))
        if self.task.group is not None:
            groups = label_column(batch.column(self.task.group)).unique().to_pylist()
            self._groups.update(group for group in groups if group is not None)
        if holds_labels(self.task, batch):
            self._update_labels(batch)
        else:
            self._update_columns(batch)

    def _update_labels(self, batch: pa.RecordBatch) -> None:
        owner, labels = flat_labels(
            batch.column(self.task.target.columns[0]), self.task.target.kind == "classification"
        )
        for entry in labels.value_counts().to_pylist():
            if entry["values"] is not None:
                self._counts[entry["values"]] += entry["counts"]
        self._usable += len(np.unique(owner))
        if len(self._counts) > MAX_CLASSES:
            raise UserError(
                f"the target has more than {MAX_CLASSES} classes",
                where=self._where,
                got=listing(sorted(self._counts), 3),
                fix="perhaps the target is another column, or its kind is regression",
            )

    def _update_columns(self, batch: pa.RecordBatch) -> None:
        """Multilabel columns, distribution and regression: `[n, columns]` numbers with NaN where unknown."""
        values, keep = VALUES[str(self.task.target.kind)](self.task, batch)
        values = values[keep]
        finite = np.isfinite(values)
        self._usable += int(keep.sum())
        self._known += finite.sum(0)
        self._sums += np.where(finite, values, 0.0).sum(0)
        for moments, column in zip(self._targets, values.T, strict=True):
            moments.update(column)

    @property
    def _where(self) -> str:
        where = f", where {self.task.where[0]} is {self.task.where[1]!r}" if self.task.where else ""
        return f"task {self.task.name}, {self.task.train}, target {listing(self.task.target.columns, 4)}{where}"

    def finish(self) -> FittedTask:
        if self.rows["train"] == 0:
            raise UserError("there are no training rows", where=self._where, fix="look at where, split and max_rows")
        if self._usable == 0:
            raise UserError(
                "the target is missing in every training row",
                where=self._where,
                got=f"{self.rows['train']} rows, none with a value",
            )
        classes, counts, known = self._classes()
        regression = self.task.target.kind == "regression"
        if regression:
            self._check_targets()
        return FittedTask(
            task=self.task,
            classes=classes,
            class_counts=counts,
            known_counts=known,
            number_mean={name: moments.mean for name, moments in self.numbers.items()},
            number_std={name: moments.std for name, moments in self.numbers.items()},
            target_mean=tuple(moments.mean for moments in self._targets) if regression else (),
            target_std=tuple(moments.std for moments in self._targets) if regression else (),
            train_rows=self.rows["train"],
            valid_rows=self.rows["valid"],
            test_rows=self.rows["test"],
            dropped_rows=self.rows["train"] - self._usable,
            groups=tuple(natural_order(self._groups)),
        )

    def _check_targets(self) -> None:
        for name, moments in zip(self.task.target.columns, self._targets, strict=True):
            if moments.count == 0:
                raise UserError(f"target column {name!r} is missing in every training row", where=self._where)
            if not moments.varies:
                raise UserError(
                    f"target column {name!r} has one value only: there is nothing to learn",
                    where=self._where,
                    got=f"{moments.mean:g} in all of {moments.count} rows",
                )

    def _classes(self) -> tuple[tuple[str, ...], tuple[int, ...], tuple[int, ...]]:
        kind, columns = self.task.target.kind, self.task.target.columns
        if kind == "regression":
            return (), (), tuple(self._known.tolist())
        if self._counts or kind in ("classification", "tagging"):
            classes = tuple(natural_order(self._counts))
            counts = tuple(self._counts[name] for name in classes)
            known = self._usable if kind != "tagging" else sum(counts)
            if len(classes) < 2 and kind != "multilabel":
                raise UserError(
                    "the target has one class only: there is nothing to learn",
                    where=self._where,
                    expected="at least 2 classes in the training rows",
                    got=f"{listing(map(repr, classes))} in all of {known}",
                )
            return classes, counts, (known,) * len(classes)
        positives = np.rint(self._sums).astype(np.int64)
        if kind == "multilabel" and (positives.sum() == 0 or (positives == self._known).all()):
            raise UserError(
                "every known label is the same: there is nothing to learn",
                where=self._where,
                expected="both 0 and 1 among the labels",
                got="only 0" if positives.sum() == 0 else "only 1",
            )
        return columns, tuple(positives.tolist()), tuple(self._known.tolist())
