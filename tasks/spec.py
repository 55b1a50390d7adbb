"""What a task is: inputs, target, data, loss, metrics. Plain frozen data: no arrays, nothing opened.

A spec may leave kinds open (`None`); `tasks.infer` closes them by looking at the file and reports what it chose.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

InputKind = Literal["text", "image", "audio", "number", "category"]
TargetKind = Literal["classification", "multilabel", "regression", "tagging", "distribution"]
OnBad = Literal["stop", "skip"]

LOSSES: dict[TargetKind, tuple[str, ...]] = {
    "classification": ("softmax_cross_entropy",),
    "distribution": ("softmax_cross_entropy",),
    "multilabel": ("sigmoid_cross_entropy",),
    "regression": ("squared_error", "absolute_error", "huber"),
    "tagging": ("softmax_cross_entropy",),
}
"""The losses each kind of target may use; the first is the default."""

METRICS: dict[TargetKind, tuple[str, ...]] = {
    "classification": ("accuracy", "macro_f1", "roc_auc"),
    "distribution": ("accuracy", "cross_entropy"),
    "multilabel": ("roc_auc", "macro_f1", "micro_f1"),
    "regression": ("rmse", "mae", "r2"),
    "tagging": ("token_accuracy", "span_f1"),
}
"""The metrics each kind may use; the first is the default and the one early stopping looks at."""

LOWER_IS_BETTER = frozenset({"rmse", "mae", "cross_entropy", "loss"})


@dataclass(frozen=True)
class Input:
    """One input column. `kind=None` means: infer it from the file."""

    column: str
    kind: InputKind | None = None


@dataclass(frozen=True)
class Target:
    """What is predicted.

    `columns` is one column for classification, tagging and a list-valued multilabel column (JSONL `labels`), and one
    or several for regression, multilabel (one 0/1/blank column per label) and distribution (one column per class).
    """

    columns: tuple[str, ...]
    kind: TargetKind | None = None


@dataclass(frozen=True)
class Split:
    """Fractions cut from the training file, by a seeded hash of the row number, for the splits that are not given."""

    valid: float = 0.1
    test: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class Task:
    """What a user wants solved.

    Attributes:
        name: unique in a model; letters, digits, `_`, `-`, `.` and `/`.
        train: a file, a folder, or a glob; the reader is chosen by its ending (or `format`).
        valid, test: as `train`; those not given are cut from `train` by `split`.
        inputs: empty means: every column that is not a target, a group or ignored.
        ignore: columns never used.
        each: make one task per value of this column, named `<name>/<value>`, see `tasks.registry.expand`.
        where: `(column, value)`: keep only rows in which the column, as text, equals the value.
        loss, metrics: by default the first of `LOSSES` / all of `METRICS` of the target's kind.
        weight: multiplies the task's sampling weight in joint training.
        group: a column whose values split the evaluation's figures.
        on_bad: what an undecodable row does: stop with its place named, or skip it and count.
        max_rows: use only the first rows of the training file.
        encoding: of text files; by default a byte order mark decides, else UTF-8.
    """

    name: str
    train: str
    target: Target
    inputs: tuple[Input, ...] = ()
    valid: str | None = None
    test: str | None = None
    split: Split = field(default_factory=Split)
    ignore: tuple[str, ...] = ()
    each: str | None = None
    where: tuple[str, str] | None = None
    format: str | None = None
    loss: str | None = None
    metrics: tuple[str, ...] = ()
    weight: float = 1.0
    group: str | None = None
    on_bad: OnBad = "stop"
    max_rows: int | None = None
    encoding: str | None = None
