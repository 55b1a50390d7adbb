"""What a task knows already: rows of its own files that have a target, and rows of a pool that are filled in.

Axis letters: n rows of a batch, k rows that the task knows.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tasks.encode import input_columns
from tasks.errors import UserError
from tasks.fitted import FittedTask
from tasks.readers import Reader
from tasks.spec import Input
from tasks.splits import ROW, rows_by_split
from tasks.values import is_list, label_column, number_column, text_column


@dataclass(frozen=True)
class Known:
    """The rows of a task's own files that have a target.

    Attributes:
        digests: `[k]` uint64, sorted: what the inputs of each are, see `digests`.
        unread: why they could not be read, if so.
    """

    digests: np.ndarray
    unread: str | None = None

    def holds(self, digests: np.ndarray) -> np.ndarray:
        """`[n]` bool: whether a row with these inputs is among them."""
        return np.isin(digests, self.digests)


def known_rows(fitted: FittedTask) -> Known:
    """Reads the task's training, validation and test files again, if they are still there."""
    found = [np.zeros(0, np.uint64)]
    try:
        for batch in labelled(fitted):
            found.append(digests(fitted, batch))
    except UserError as error:
        return Known(np.unique(np.concatenate(found)), f"{error.problem}: {error.where or fitted.task.train}")
    return Known(np.unique(np.concatenate(found)))


def labelled(fitted: FittedTask) -> Iterator[pa.RecordBatch]:
    """The rows of the task's own files that have a target: its input columns, and their numbers in `__row__`."""
    wanted, targets = input_columns(fitted), list(fitted.task.target.columns)
    for _, batch in rows_by_split(fitted.task, columns=[*wanted, *targets], rows_per_batch=4096):
        yield batch.filter(pa.array(has_target(batch, targets))).select([*wanted, ROW])


def has_target(batch: pa.RecordBatch, columns: Sequence[str]) -> np.ndarray:
    """`[n]` bool: rows in which one of these columns, or more, is filled in."""
    filled = np.zeros(batch.num_rows, bool)
    for name in columns:
        array = batch.column(name)
        filled |= np.asarray((array if is_list(array) else label_column(array)).is_valid())
    return filled


def partly_filled(reader: Reader, columns: Sequence[str]) -> bool:
    """Whether a file has these columns and a target in some of its rows, but not in all."""
    if not set(columns) <= set(reader.columns):
        return False
    seen = np.zeros(2, np.int64)
    for batch in reader.batches(columns):
        seen += np.bincount(has_target(batch, columns), minlength=2)
    return bool((seen > 0).all())


def digests(fitted: FittedTask, batch: pa.RecordBatch) -> np.ndarray:
    """`[n]` uint64: equal for rows with equal inputs, however they are spelled: 1 and 1.0, `NA` and nothing."""
    folder = Path((batch.schema.metadata or {}).get(b"folder", b".").decode())
    cells = [_cells(column, batch.column(column.column), folder) for column in fitted.task.inputs]
    packed = [repr(row).encode("utf-8", "surrogatepass") for row in zip(*cells, strict=True)]
    found = b"".join(hashlib.blake2b(row, digest_size=8).digest() for row in packed)
    return np.frombuffer(found, "<u8").astype(np.uint64)


def _cells(column: Input, array: pa.Array, folder: Path) -> list[Any]:
    """The values of an input as encoding understands them."""
    if column.kind == "number":
        return number_column(array).tolist()
    if column.kind == "category":
        return label_column(array).to_pylist()
    if column.kind in ("image", "audio"):
        values = array.to_pylist()
        return [os.path.normpath(folder / value) if isinstance(value, str) else value for value in values]
    return array.to_pylist() if is_list(array) else text_column(array).to_pylist()
