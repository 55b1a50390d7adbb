"""Targets as arrays: `y` with a mask, tags per word, and what was left out and why.

Axis letters: n rows of the batch, Y outputs of the task's head.

A label of valid or test that training never had has no output. Its row gets `keep=False` and is counted in `unseen`; a
fair evaluation counts these rows as wrong, `sum(unseen.values())` of them, and names the labels.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks.check import listing
from tasks.errors import UserError
from tasks.fitted import FittedTask
from tasks.target_values import VALUES, flat_labels, holds_labels, row_name
from tasks.values import is_list, target_numbers


@dataclass(frozen=True)
class EncodedTarget:
    """The targets of a batch.

    Attributes:
        y: `[n, Y]` float32: one-hot, shares, 0/1, or standardised values; zeros for tagging.
        y_mask: `[n, Y]` float32: 1 where the target is known.
        tags: for tagging, per row the class of each word, int32, -1 where it is unseen; else None.
        keep: `[n]` bool: rows with a target that can be used.
        unseen: labels not seen in training, with the rows (words for tagging, items for lists) that had them.
        missing: rows without a target.
        bad: rows whose target cannot be used, with `on_bad="skip"`.
    """

    y: np.ndarray
    y_mask: np.ndarray
    tags: list[np.ndarray] | None
    keep: np.ndarray
    unseen: Counter[str] = field(default_factory=Counter)
    missing: int = 0
    bad: int = 0


def encode_target(fitted: FittedTask, batch: pa.RecordBatch) -> EncodedTarget:
    """Encodes the targets of a batch from `tasks.splits.rows`.

    Raises:
        UserError: a value that cannot be a target, named with its row, unless the task skips bad rows.
    """
    kind = fitted.task.target.kind
    if kind == "tagging":
        return _tags(fitted, batch)
    if holds_labels(fitted.task, batch):
        return _one_hot(fitted, batch) if kind == "classification" else _label_lists(fitted, batch)
    return _columns(fitted, batch)


def decode_outputs(fitted: FittedTask, values: np.ndarray) -> np.ndarray:
    """Outputs `[..., Y]` in the user's units: regression times deviation plus mean; probabilities as they are."""
    if fitted.task.target.kind != "regression":
        return values
    return np.asarray(values, np.float64) * np.array(fitted.target_std) + np.array(fitted.target_mean)


def unseen_warning(fitted: FittedTask, split: str, unseen: Counter[str]) -> str | None:
    """A line that tells how many rows of a split have labels that training never had; None when there are none."""
    if not unseen:
        return None
    names = listing((f"{label!r} ({count})" for label, count in unseen.most_common()), 10)
    unit = "words" if fitted.is_token_level else "rows"
    return (
        f"task {fitted.task.name}: {sum(unseen.values())} {unit} of {split} have labels not seen in training: {names}; "
        "they count as wrong"
    )


def _index(fitted: FittedTask, labels: pa.StringArray) -> np.ndarray:
    """`[m]` int32 class of each label, -1 for one that training never had."""
    places = pc.index_in(labels, value_set=pa.array(fitted.classes, pa.string()))
    return pc.fill_null(places, -1).to_numpy(zero_copy_only=False).astype(np.int32)


def _unseen(labels: pa.StringArray, index: np.ndarray) -> Counter[str]:
    return Counter(labels.filter(pa.array(index < 0)).to_pylist())


def _empty(fitted: FittedTask, n: int) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((n, fitted.num_outputs), np.float32), np.zeros((n, fitted.num_outputs), np.float32)


def _one_hot(fitted: FittedTask, batch: pa.RecordBatch) -> EncodedTarget:
    y, mask = _empty(fitted, batch.num_rows)
    owner, labels = flat_labels(batch.column(fitted.task.target.columns[0]), single=True)
    index = _index(fitted, labels)
    seen = index >= 0
    y[owner[seen], index[seen]] = 1.0
    mask[owner[seen]] = 1.0
    return EncodedTarget(
        y, mask, None, np.asarray(mask.any(1)), _unseen(labels, index), missing=batch.num_rows - len(owner)
    )


def _label_lists(fitted: FittedTask, batch: pa.RecordBatch) -> EncodedTarget:
    """An empty list means that no label holds; only a null is missing."""
    y, mask = _empty(fitted, batch.num_rows)
    column = batch.column(fitted.task.target.columns[0])
    owner, labels = flat_labels(column, single=False)
    index = _index(fitted, labels)
    y[owner[index >= 0], index[index >= 0]] = 1.0
    known = np.asarray(column.is_valid())
    mask[known] = 1.0
    return EncodedTarget(y, mask, None, known, _unseen(labels, index), missing=int((~known).sum()))


def _columns(fitted: FittedTask, batch: pa.RecordBatch) -> EncodedTarget:
    values, keep = VALUES[str(fitted.task.target.kind)](fitted.task, batch)
    known = np.isfinite(values) & keep[:, None]
    if fitted.task.target.kind == "regression":
        values = (values - np.array(fitted.target_mean)) / np.array(fitted.target_std)
    y = np.where(known, values, 0.0).astype(np.float32)
    blank = np.all([target_numbers(batch.column(name)).missing for name in fitted.task.target.columns], axis=0)
    missing = int((~keep & blank).sum())
    return EncodedTarget(y, known.astype(np.float32), None, keep, missing=missing, bad=int((~keep).sum()) - missing)


def _tags(fitted: FittedTask, batch: pa.RecordBatch) -> EncodedTarget:
    y, mask = _empty(fitted, batch.num_rows)
    column, words = batch.column(fitted.task.target.columns[0]), batch.column(fitted.tokens_column)
    if not is_list(column):
        raise UserError(
            "the tags are not lists", where=f"task {fitted.task.name}", expected="a list of tags in each row"
        )
    lengths = _lengths(column)
    wrong = (lengths != _lengths(words)) & np.asarray(column.is_valid())
    if wrong.any() and fitted.task.on_bad == "stop":
        first = int(np.flatnonzero(wrong)[0])
        raise UserError(
            "words and tags differ in number",
            where=f"task {fitted.task.name}, {row_name(batch, first)}",
            expected=f"{int(_lengths(words)[first])} tags, one for each word",
            got=f"{int(lengths[first])} tags",
            fix="mend the row, or leave such rows out with on_bad = 'skip'",
        )
    _, labels = flat_labels(column, single=False)
    index = _index(fitted, labels)
    tags = np.split(index, np.cumsum(lengths)[:-1]) if len(lengths) else []
    missing = lengths == 0
    return EncodedTarget(
        y, mask, tags, ~wrong & ~missing, _unseen(labels, index), int((missing & ~wrong).sum()), int(wrong.sum())
    )


def _lengths(array: pa.Array) -> np.ndarray:
    return pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False).astype(np.int64)
