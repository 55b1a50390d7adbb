"""Targets of a batch as labels or numbers, with the row named when a value cannot be one.

Axis letters: n rows of the batch, Y target columns.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks.errors import UserError
from tasks.spec import Task
from tasks.splits import ROW
from tasks.values import is_list, label_column, target_numbers, text_column

_TRUTH = {"true": "1", "false": "0", "yes": "1", "no": "0"}


def flat_labels(array: pa.Array, single: bool) -> tuple[np.ndarray, pa.StringArray]:
    """All labels of a column in one array, and for each the row `[m]` it belongs to.

    With `single` every row holds one label, and rows without one are left out; else rows hold lists, and every item
    stands, also one spelled like a missing marker, for a tag may be called `None`.
    """
    if single:
        labels = label_column(array)
        known = np.asarray(labels.is_valid())
        return np.flatnonzero(known), labels.filter(pa.array(known))
    if not is_list(array):
        return np.zeros(0, np.int64), pa.array([], pa.string())
    return np.asarray(pc.list_parent_indices(array)).astype(np.int64), text_column(array.flatten())


def regression_columns(task: Task, batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray]:
    """`[n, Y]` float64 with NaN where missing, and `[n]` bool: rows with a known value and no bad one."""
    numbers = [target_numbers(batch.column(name)) for name in task.target.columns]
    for name, number in zip(task.target.columns, numbers, strict=True):
        _refuse(task, batch, name, number.bad, "a finite number, or blank where it is not known")
    values = np.stack([number.value for number in numbers], axis=1)
    bad = np.any([number.bad for number in numbers], axis=0)
    return values, np.isfinite(values).any(1) & ~bad


def binary_columns(task: Task, batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray]:
    """As `regression_columns`, of labels 0 and 1 (or true/false, yes/no)."""
    columns, wrong = [], np.zeros(batch.num_rows, bool)
    for name in task.target.columns:
        texts = [_TRUTH.get(t.lower(), t) if t else t for t in label_column(batch.column(name)).to_pylist()]
        number = target_numbers(pa.array(texts, pa.string()))
        bad = number.bad | (~number.missing & ~np.isin(number.value, (0.0, 1.0)))
        _refuse(task, batch, name, bad, "0, 1 or blank")
        columns.append(number.value)
        wrong |= bad
    values = np.stack(columns, axis=1)
    return values, np.isfinite(values).any(1) & ~wrong


def share_columns(task: Task, batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray]:
    """`[n, Y]` float64 shares that sum to 1 in each row kept; counts are normalised; rows with a blank are not kept."""
    numbers = [target_numbers(batch.column(name)) for name in task.target.columns]
    for name, number in zip(task.target.columns, numbers, strict=True):
        _refuse(task, batch, name, number.bad | (number.value < 0), "a share or a count, 0 or more")
    values = np.stack([number.value for number in numbers], axis=1)
    complete = np.isfinite(values).all(1)
    total = values.sum(1)
    zero = complete & (total == 0)
    _refuse(task, batch, task.target.columns[0], zero, "a distribution: at least one share above 0")
    keep = complete & (values >= 0).all(1) & ~zero
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(keep[:, None], values / total[:, None], np.nan), keep


def _refuse(task: Task, batch: pa.RecordBatch, column: str, bad: np.ndarray, expected: str) -> None:
    """Raises for the first bad row unless the task skips bad rows."""
    if task.on_bad == "skip" or not bad.any():
        return
    first = int(np.flatnonzero(bad)[0])
    file = (batch.schema.metadata or {}).get(b"file", task.train.encode()).decode()
    raise UserError(
        "a target value cannot be used",
        where=f"task {task.name}, {file}, {row_name(batch, first)}, column {column}",
        expected=expected,
        got=repr(batch.column(column)[first].as_py()),
        fix="mend it, or leave such rows out with on_bad = 'skip'",
    )


def row_name(batch: pa.RecordBatch, index: int) -> str:
    """How a row is called in errors: its number in the data from 1, the header not counted."""
    number = batch.column(ROW)[index].as_py() if ROW in batch.schema.names else index
    return f"data row {number + 1}"


def holds_labels(task: Task, batch: pa.RecordBatch) -> bool:
    """Whether the target is labels (one or a list in a cell) rather than a number in each of the target columns."""
    column = batch.column(task.target.columns[0])
    kind = task.target.kind
    one = len(task.target.columns) == 1 and (is_list(column) or pa.types.is_null(column.type))
    return kind in ("classification", "tagging") or (kind == "multilabel" and one)


VALUES = {"regression": regression_columns, "distribution": share_columns, "multilabel": binary_columns}
"""Kind -> the function that reads its target columns as numbers."""
