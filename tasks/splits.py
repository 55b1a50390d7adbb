"""The rows of a split: from its own file, or cut from the training file by a seeded hash of the row number."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks.readers import Reader, open_reader
from tasks.spec import Split, Task
from tasks.values import number_column, text_column

SplitName = Literal["train", "valid", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "valid", "test")

ROW = "__row__"
"""The column of row numbers: int64, from 0, counted over the rows the reader gives (skipped ones are not counted)."""

_GOLDEN = 0x9E3779B97F4A7C15


def split_path(task: Task, split: SplitName) -> str:
    """The file the split's rows are in."""
    return getattr(task, split) or task.train


def open_split(task: Task, split: SplitName, *, rows_per_batch: int = 4096) -> Reader:
    """The reader of the split's file, as the task says to read it."""
    return open_reader(
        split_path(task, split),
        format=task.format,
        rows_per_batch=rows_per_batch,
        on_bad=task.on_bad,
        encoding=task.encoding,
    )


def rows(
    task: Task,
    split: SplitName,
    *,
    columns: Sequence[str] | None = None,
    rows_per_batch: int = 4096,
    reader: Reader | None = None,
) -> Iterator[pa.RecordBatch]:
    """Streams a split's rows, `where` applied, with their numbers in the last column, `__row__`.

    `max_rows` counts rows of the training file, before the cut into splits and before `where`.

    Args:
        columns: only these, in this order; all by default.
        rows_per_batch: the most rows in a batch; it does not change which rows come.
        reader: one from `open_split` of the same task and split, to ask it afterwards what it skipped.
    """
    needed = _with(columns, task.where[0] if task.where else None)
    for batch in _numbered(task, split, needed, rows_per_batch, reader):
        batch = _where(task, _part(task, split, batch))
        if batch.num_rows:
            yield batch if columns is None else batch.select([*columns, ROW])


def rows_by_split(
    task: Task, *, columns: Sequence[str] | None = None, rows_per_batch: int = 65536
) -> Iterator[tuple[SplitName, pa.RecordBatch]]:
    """Yields `(split, rows)` for all three, reading each file once; what `rows` gives for each split, in its order."""
    needed = _with(columns, task.where[0] if task.where else None)
    for file in SPLITS:
        if file != "train" and getattr(task, file) is None:
            continue
        for batch in _numbered(task, file, needed, rows_per_batch, None):
            for split in SPLITS if file == "train" else (file,):
                if split != file and getattr(task, split) is not None:
                    continue
                part = _where(task, _part(task, split, batch))
                if part.num_rows:
                    yield split, part if columns is None else part.select([*columns, ROW])


def rows_by_value(
    task: Task,
    split: SplitName,
    column: str,
    *,
    columns: Sequence[str] | None = None,
    numbers: Collection[str] = (),
    rows_per_batch: int = 65536,
) -> Iterator[tuple[str, pa.RecordBatch]]:
    """Streams the split once and yields `(value of the column, its rows of this batch)`; for tasks made by `expand`.

    The columns in `numbers` come as float64, NaN where `tasks.values.number_column` has it: read once for all values.
    """
    needed = _with(columns, column)
    for whole in _numbered(task, split, needed, rows_per_batch, None):
        batch = _part(task, split, whole)
        codes = text_column(batch.column(column)).dictionary_encode()
        for name in numbers:
            place = batch.schema.get_field_index(name)
            batch = batch.set_column(place, name, pa.array(number_column(batch.column(name))))
        order = np.argsort(codes.indices.fill_null(-1).to_numpy(), kind="stable")
        sizes = np.bincount(codes.indices.fill_null(-1).to_numpy() + 1, minlength=len(codes.dictionary) + 1)
        sorted_batch = batch.take(pa.array(order)).replace_schema_metadata(batch.schema.metadata)
        kept = sorted_batch if columns is None else sorted_batch.select([*columns, ROW])
        start = int(sizes[0])
        for value, size in zip(codes.dictionary.to_pylist(), sizes[1:].tolist(), strict=True):
            yield value, kept.slice(start, size)
            start += size


def assign(row: np.ndarray, split: Split) -> np.ndarray:
    """For `[n]` row numbers a uniform number `[n]` in 0..1 (splitmix64 of row and seed): below `test` is test, the
    next `valid` are valid, the rest train."""
    seed = (split.seed * _GOLDEN + 0xD1B54A32D192ED03) % 2**64
    with np.errstate(over="ignore"):
        z = (row.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN) + np.uint64(seed)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) / 2.0**53


def _with(columns: Sequence[str] | None, extra: str | None) -> list[str] | None:
    if columns is None:
        return None
    return [*columns, extra] if extra is not None and extra not in columns else list(columns)


def _numbered(
    task: Task, split: SplitName, columns: list[str] | None, rows_per_batch: int, reader: Reader | None
) -> Iterator[pa.RecordBatch]:
    """The rows of the split's file with their numbers, before any cut or choice."""
    reader = reader or open_split(task, split, rows_per_batch=rows_per_batch)
    limit = None if _has_own_file(task, split) else task.max_rows
    start = 0
    for batch in reader.batches(columns):
        if limit is not None:
            batch = batch.slice(0, limit - start)
        number = np.arange(start, start + batch.num_rows)
        start += batch.num_rows
        fields = [*batch.schema, pa.field(ROW, pa.int64())]
        schema = pa.schema(fields, metadata=batch.schema.metadata)
        yield pa.RecordBatch.from_arrays([*batch.columns, pa.array(number, pa.int64())], schema=schema)
        if limit is not None and start >= limit:
            return


def _has_own_file(task: Task, split: SplitName) -> bool:
    return split != "train" and getattr(task, split) is not None


def _part(task: Task, split: SplitName, batch: pa.RecordBatch) -> pa.RecordBatch:
    """The split's rows of a batch of its file."""
    if _has_own_file(task, split):
        return batch
    return batch.filter(pa.array(_belongs(task, split, batch.column(ROW).to_numpy())))


def _where(task: Task, batch: pa.RecordBatch) -> pa.RecordBatch:
    if task.where is None:
        return batch
    column, value = task.where
    return batch.filter(pc.fill_null(pc.equal(text_column(batch.column(column)), value), False))


def _belongs(task: Task, split: SplitName, number: np.ndarray) -> np.ndarray:
    place = assign(number, task.split)
    test = 0.0 if task.test is not None else task.split.test
    valid = test + (0.0 if task.valid is not None else task.split.valid)
    if split == "test":
        return place < test
    return (place >= test) & (place < valid) if split == "valid" else place >= valid
