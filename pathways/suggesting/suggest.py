"""Which rows of a pool a person should label next.

A row's label helps where the model doubts its answer, and where no other chosen row would teach the same. So the pool
is read once, in batches: the model answers each row, and the most doubtful ones are kept as candidates (`scan`). These
are divided into groups of rows that are alike to the model, and the most doubtful of each is named (`choice`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pathways.inference import ROWS_AT_ONCE, to_table
from pathways.inference_files import chosen, opened
from pathways.suggesting.choice import most_doubtful, standardised, unlike
from pathways.suggesting.doubt import DOUBTABLE
from pathways.suggesting.known import Known, known_rows, partly_filled
from pathways.suggesting.scan import Batches, Tally, cells_of, sample_of_known, scan
from tasks.encode import input_columns
from tasks.errors import UserError

if TYPE_CHECKING:
    from pathways.model import Model

CANDIDATES = 10
"""Candidates for each row that is asked for."""
SAMPLE = 10_000
"""Candidates, at least, where the model cannot doubt: a seeded sample of the pool."""


@dataclass(frozen=True)
class Suggestions:
    """Rows of a pool, best first.

    Attributes:
        task: whose labels they want.
        table: `row` (its number in the pool, from 1), `score`, `prediction`, `probability` of that.
        cells: the same rows as the pool has them: the columns kept, then those that the task reads.
        tally: what became of the pool's rows.
        notes: what a person should know of how they were chosen.
    """

    task: str
    table: pa.Table
    cells: pa.Table
    tally: Tally
    notes: tuple[str, ...]


def suggest(
    model: Model,
    task: str,
    pool: Any,
    n: int = 50,
    *,
    seed: int = 0,
    keep: Sequence[str] = (),
    folder: str | Path = ".",
    encoding: str | None = None,
) -> Suggestions:
    """Names the rows of a pool whose labels would help a task most.

    The `score` is the doubt of the model from 0 to 1 (`doubt`); where it cannot doubt, for numbers and distributions,
    the distance from the nearest row that the task knows or that stands before (null for a first one of a task whose
    files are gone).

    Args:
        pool: a file that the readers know ("-" for standard input), or rows as `predict` takes them. A target column
            is ignored; but where a file has it filled in for some rows and blank for others, the filled ones are
            passed over.
        n: how many; fewer come where there are no more.
        seed: of where the groups begin, and of what is drawn where the model cannot doubt.
        keep: further columns of the file for `cells`.
        folder: where relative paths of images and sounds start, for rows that are no file.
        encoding: of a text file; by default its byte order mark decides, else UTF-8.

    Raises:
        UserError: an unknown task or column, no row left to label, or what `predict` refuses.
    """
    wanted = input_columns(model.entry(task).fitted)
    if n < 1:
        raise UserError("That is no number of rows.", where="-n", expected="at least 1", got=str(n))
    if not isinstance(pool, str | Path):
        if keep:
            raise UserError("Only columns of a file can be kept.", where=f"task {task}", got=", ".join(keep))
        table = to_table(model.entry(task).fitted, pool).replace_schema_metadata({b"folder": str(folder).encode()})
        batches = table.to_batches(max_chunksize=ROWS_AT_ONCE)
        return _suggest(model, task, lambda: iter(batches), (), wanted, n, seed)
    with opened(str(pool), encoding) as (reader, base):
        targets = list(model.entry(task).fitted.task.target.columns)
        filled = targets if partly_filled(reader, targets) else []

        def read() -> Iterator[pa.RecordBatch]:
            for batch in chosen(model, task, reader, [*keep, *filled]):
                place = base or (batch.schema.metadata or {}).get(b"folder", b".").decode()
                yield batch.replace_schema_metadata({b"folder": place.encode()})

        return _suggest(model, task, read, filled, list(dict.fromkeys([*keep, *wanted])), n, seed)


def _suggest(
    model: Model, task: str, read: Batches, filled: Sequence[str], columns: Sequence[str], n: int, seed: int
) -> Suggestions:
    fitted = model.entry(task).fitted
    doubting, known = fitted.task.target.kind in DOUBTABLE, known_rows(fitted)
    most = CANDIDATES * n if doubting else max(CANDIDATES * n, SAMPLE)
    candidates, tally = scan(model, task, read(), most, known, filled, seed)
    if not len(candidates):
        raise UserError(
            "No row of the pool is left to label.",
            where=f"task {task}",
            expected="rows that stand in no file of the task, have no target yet, and decode",
            got=f"{tally.rows} rows, {tally.labelled} with a label, {tally.unreadable} that do not decode",
        )
    x = standardised(candidates.x, candidates.x)
    if doubting:
        order = most_doubtful(x, candidates.doubt, n, seed)
        score = candidates.doubt[order]
    else:
        known_x = standardised(sample_of_known(model, task, seed), candidates.x)
        order, score = unlike(x, n, known_x, seed)
    best = candidates.take(order)
    table = {
        "row": pa.array(best.row + 1),
        "score": pa.array(np.where(np.isinf(score), np.nan, score), from_pandas=True),
        "prediction": pa.array(best.answer.tolist()),
        "probability": pa.array(best.sure.tolist(), pa.float64()),
    }
    cells = cells_of(fitted, read(), best.row, columns)
    return Suggestions(task, pa.table(table), cells, tally, tuple(_notes(tally, known, doubting, n, len(best))))


def _notes(tally: Tally, known: Known, doubting: bool, n: int, found: int) -> Iterator[str]:
    if tally.labelled:
        yield f"{tally.labelled:,} rows have a label already, here or in the task's own files: passed over"
    if tally.unreadable:
        yield f"{tally.unreadable:,} rows have an image or a sound that does not decode: left out"
    if known.unread:
        yield f"the task's own rows cannot be read again, so some may be named that have a label ({known.unread})"
    if not doubting:
        yield "a model cannot doubt a number: these rows are the least like those it knows, and like each other"
    if found < n:
        yield f"no more than {found:,} different rows are left to label"
