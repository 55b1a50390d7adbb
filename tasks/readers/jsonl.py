"""JSON lines: an object on each line. Values keep their types; lists become list columns."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from tasks.errors import UserError
from tasks.readers import files
from tasks.readers.files import Request

SCAN = 2000
"""Objects looked at to learn the columns; a key that first appears later is not a column."""

MAX_BYTES = 1 << 26


def columns(request: Request) -> tuple[str, ...]:
    """Every key of the first `SCAN` objects, in order of appearance."""
    scan = Request(request.path, request.rows_per_batch, request.on_bad, request.encoding)
    names: dict[str, None] = {}
    for _, row in itertools.islice(_objects(scan), SCAN):
        names.update(dict.fromkeys(row))
    if not names:
        raise UserError(
            "the file has no objects", where=request.path, expected='lines such as {"text": "...", "label": 1}'
        )
    return tuple(names)


def batches(request: Request, wanted: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Batches with the types of the first one where they fit, and wider ones where a later value needs it."""
    request.skipped = 0
    types: dict[str, pa.DataType] = {}
    rows: list[dict[str, Any]] = []
    size = 0
    for length, row in _objects(request):
        rows.append(row)
        size += length
        if len(rows) == request.rows_per_batch or size > MAX_BYTES:
            yield _batch(rows, wanted, types)
            rows, size = [], 0
    if rows:
        yield _batch(rows, wanted, types)


def _objects(request: Request) -> Iterator[tuple[int, dict[str, Any]]]:
    """(length of the line, object) of each line that is not blank."""
    for number, line in files.lines(request):
        if not line.strip():
            continue
        row: Any = None
        try:
            row = json.loads(line)
            problem = f"a {type(row).__name__}"
        except (ValueError, RecursionError) as error:
            problem = str(error)
        if isinstance(row, dict):
            yield len(line), row
        else:
            request.bad(
                UserError(
                    "a line is not a JSON object",
                    where=f"{request.path}, line {number}",
                    expected='an object such as {"text": "...", "label": 1}',
                    got=problem,
                    fix="mend the line, or leave such lines out with on_bad = 'skip'",
                )
            )


def _batch(rows: list[dict[str, Any]], wanted: Sequence[str], types: dict[str, pa.DataType]) -> pa.RecordBatch:
    arrays = []
    for name in wanted:
        array = _array([row.get(name) for row in rows], types.get(name))
        if not pa.types.is_null(array.type):
            types[name] = array.type
        arrays.append(array)
    return pa.RecordBatch.from_arrays(arrays, names=list(wanted))


def _array(values: list[Any], known: pa.DataType | None) -> pa.Array:
    """Of the known type if nothing is lost by it, else of the inferred one; mixed values all as their text."""
    try:
        array = pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError):
        return pa.array([v if v is None or isinstance(v, str) else json.dumps(v) for v in values], type=pa.string())
    if known is None or array.type == known or pa.types.is_string(array.type):
        return array
    try:
        return array.cast(known, safe=True)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
        return array
