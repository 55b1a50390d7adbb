"""Reading a pool: once to find candidates, in memory that does not grow with it, and once to fetch the rows chosen.

Axis letters: n rows, D width.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pathways.convolution import pooled_width
from pathways.inference import Rows, read_rows, to_table
from pathways.predictions import predict_examples
from pathways.suggesting.candidates import Candidates, merge, objects
from pathways.suggesting.doubt import answers, doubt, sureness
from pathways.suggesting.known import Known, digests, has_target, labelled
from tasks.errors import UserError
from tasks.fitted import FittedTask
from tasks.spec import Split
from tasks.splits import ROW, assign

if TYPE_CHECKING:
    from pathways.model import Model

KNOWN_SAMPLE = 2_000
"""About so many of a task's own rows say what it knows."""

Batches = Callable[[], Iterator[pa.RecordBatch]]
"""Begins to read a pool; the folder of relative paths stands in the metadata of each batch."""


@dataclass(frozen=True)
class Tally:
    """Rows of a pool; of these, how many have a label already, and how many do not decode."""

    rows: int
    labelled: int
    unreadable: int


def scan(
    model: Model,
    task: str,
    batches: Iterator[pa.RecordBatch],
    most: int,
    known: Known,
    filled: Sequence[str],
    seed: int,
) -> tuple[Candidates, Tally]:
    """The rows of a pool that may be suggested: at most `most`, the most doubtful, or a seeded sample where the model
    cannot doubt.

    Args:
        filled: target columns: rows in which one is filled in are passed over.
    """
    fitted, width = model.entry(task).fitted, pooled_width(model.config)
    found, rows, labels, unreadable = Candidates.none(width), 0, 0, 0
    for batch in batches:
        digest = digests(fitted, batch)
        open_ = ~(known.holds(digest) | has_target(batch, filled))
        place = np.flatnonzero(open_)
        read, values, x = run(model, task, batch.filter(pa.array(open_)))
        place = place[read.place]
        row = rows + place
        doubts = doubt(fitted, values)
        key = assign(row, Split(seed=seed)) if doubts is None else doubts
        doubts = np.ones(len(row)) if doubts is None else doubts
        said = objects(answers(fitted, values)), objects(sureness(fitted, values))
        found = merge(found, Candidates(row, digest[place], key, doubts, x, *said), most)
        rows, labels = rows + batch.num_rows, labels + int((~open_).sum())
        unreadable += len(read.errors)
    return found, Tally(rows, labels, unreadable)


def run(model: Model, task: str, batch: pa.RecordBatch) -> tuple[Rows, Any, np.ndarray]:
    """What could be read of a batch, what the model says of it, and its pooled rows `[n, D]`."""
    fitted, metadata = model.entry(task).fitted, batch.schema.metadata or {}
    folder = metadata.get(b"folder", b".").decode()
    table = to_table(fitted, batch)
    read = read_rows(fitted, table, model.text_tokenizer, model.config.encoders, folder)
    x = [np.zeros((0, pooled_width(model.config)), np.float32)]
    said = predict_examples(model.submodel(task), {task: read.examples}, embedded=x.append)[task]
    return read, said.values, np.concatenate(x)


def sample_of_known(model: Model, task: str, seed: int) -> np.ndarray:
    """`[k, D]`: the pooled rows of a seeded sample of the task's own rows; none where its files are gone."""
    fitted = model.entry(task).fitted
    part = KNOWN_SAMPLE / max(fitted.train_rows + fitted.valid_rows + fitted.test_rows, 1)
    x = [np.zeros((0, pooled_width(model.config)), np.float32)]
    try:
        for batch in labelled(fitted):
            drawn = assign(batch.column(ROW).to_numpy(), Split(seed=seed + 1)) < part
            x.append(run(model, task, batch.filter(pa.array(drawn)))[2])
    except UserError:
        pass  # it is told by `known_rows`, which reads the same
    return np.concatenate(x)


def cells_of(
    fitted: FittedTask, batches: Iterator[pa.RecordBatch], rows: np.ndarray, columns: Sequence[str]
) -> pa.Table:
    """These columns of these rows of a pool, in the order of `rows`; paths of images and sounds are made absolute."""
    parts, begin = [], 0
    order = np.sort(rows)
    for batch in batches:
        mine = order[(order >= begin) & (order < begin + batch.num_rows)] - begin
        part = pa.Table.from_batches([batch]).select(list(columns)).take(pa.array(mine))
        parts.append(_absolute(fitted, part, (batch.schema.metadata or {}).get(b"folder", b".").decode()))
        begin += batch.num_rows
    whole = pa.concat_tables(parts, promote_options="permissive")
    return whole.take(pa.array(np.searchsorted(order, rows))).replace_schema_metadata(None)


def _absolute(fitted: FittedTask, part: pa.Table, folder: str) -> pa.Table:
    for column in fitted.task.inputs:
        kind = part.schema.field(column.column).type
        if column.kind in ("image", "audio") and (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            place = part.schema.get_field_index(column.column)
            values = [v and os.path.normpath(Path(folder).absolute() / v) for v in part.column(place).to_pylist()]
            part = part.set_column(place, column.column, pa.array(values, pa.string()))
    return part
