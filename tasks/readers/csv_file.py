"""CSV and TSV: every value is a string, so that no type guessed early breaks later. Streams through Arrow.

Arrow parses; when it refuses a file, a second, slow pass finds the line and says what is wrong with it.
"""

from __future__ import annotations

import csv
import itertools
import sys
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.csv

from tasks.check import listing
from tasks.errors import UserError
from tasks.readers import files
from tasks.readers.files import Request

BLOCK = 1 << 20
MAX_BLOCK = 1 << 30
"""Bytes Arrow parses at a time; it grows when one row is longer, up to the second."""

csv.field_size_limit(min(sys.maxsize, 2**31 - 1))


def columns(request: Request) -> tuple[str, ...]:
    """The header's names. A first column without a name, as pandas writes its index, is called `index`."""
    header = _header(request)
    names = [name.strip() or ("index" if place == 0 else f"column{place + 1}") for place, name in enumerate(header)]
    twice = sorted(
        {name for name in header if header.count(name) > 1} | {name for name in names if names.count(name) > 1}
    )
    if twice:
        raise UserError(f"the header names {listing(map(repr, twice))} more than once", where=f"{request.path}, line 1")
    return tuple(names)


def batches(request: Request, wanted: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Batches of string columns, in the order of `wanted`."""
    header = _header(request)
    original = dict(zip(columns(request), header, strict=True))
    # The last column is always read: a quote that never closes hides there, and Arrow does not complain.
    read = list(dict.fromkeys([*(original[name] for name in wanted), header[-1]]))
    last = ""
    schema = pa.schema([(name, pa.string()) for name in wanted])
    done, block = 0, BLOCK
    while True:
        request.skipped, start = 0, 0
        try:
            for batch in _arrow_batches(request, read, block):
                last = batch.column(header[-1])[-1].as_py() if batch.num_rows else last
                fresh = batch.slice(max(0, done - start))
                start += batch.num_rows
                done = max(done, start)
                for first in range(0, fresh.num_rows, request.rows_per_batch):
                    piece = fresh.slice(first, request.rows_per_batch)
                    yield pa.RecordBatch.from_arrays(piece.columns[: len(wanted)], schema=schema)
            if "\n" in last:
                _check_quotes(request)
            return
        except pa.ArrowInvalid as error:
            if "straddling" not in str(error) or block >= MAX_BLOCK:
                raise _explain(request, error) from error
            block *= 16


def _arrow_batches(request: Request, original: list[str], block: int) -> Iterator[pa.RecordBatch]:
    def invalid(row: pyarrow.csv.InvalidRow) -> str:
        if request.on_bad == "stop":
            return "error"
        request.skipped += 1
        return "skip"

    encoding = files.encoding_of(request)
    with files.reading(request.path), files.open_bytes(request.path) as file:
        stream = pa.PythonFile(file, mode="r")
        if encoding not in ("utf-8", "utf-8-sig"):
            stream = pa.transcoding_input_stream(stream, encoding, "utf-8")
        reader = pyarrow.csv.open_csv(
            stream,
            read_options=pyarrow.csv.ReadOptions(block_size=block, use_threads=False),
            parse_options=pyarrow.csv.ParseOptions(
                delimiter=_delimiter(request), newlines_in_values=True, invalid_row_handler=invalid
            ),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(original, pa.string()), include_columns=original, strings_can_be_null=False
            ),
        )
        yield from reader


def _delimiter(request: Request) -> str:
    """A tab for `.tsv` and `.tab`; else a comma, or a semicolon where the header has no comma but semicolons."""
    if files.bare_name(request.path).endswith((".tsv", ".tab")):
        return "\t"
    first = next((line for _, line in files.lines(request) if line.strip()), "")
    return next((mark for mark in ",;\t" if mark in first), ",")


def _records(request: Request) -> Iterator[tuple[int, list[str]]]:
    """(number of the record's last line, its fields), blank lines left out."""
    reader = csv.reader((line for _, line in files.lines(request)), delimiter=_delimiter(request))
    try:
        for fields in reader:
            if fields:
                yield reader.line_num, fields
    except csv.Error as error:
        raise UserError(
            "the file cannot be read as CSV",
            where=f"{request.path}, line {reader.line_num}",
            got=str(error),
            fix="if its lines end in a bare carriage return, convert them to line feeds",
        ) from error


def _header(request: Request) -> list[str]:
    for _, fields in itertools.islice(_records(request), 1):
        return fields
    raise UserError("the file is empty", where=request.path, expected="a header line and rows")


def _check_quotes(request: Request) -> None:
    """Raises UserError if a quote is open at the end of the file."""
    reader = csv.reader((line for _, line in files.lines(request)), delimiter=_delimiter(request), strict=True)
    line = 0
    try:
        for _ in reader:
            line = reader.line_num
    except csv.Error as error:
        if "unexpected end" in str(error):
            raise UserError(
                "a quote is opened and never closed",
                where=f"{request.path}, line {line + 1}",
                got="everything after it as one value",
                fix='close it, or double it where it is meant as a letter: ""',
            ) from error


def _explain(request: Request, error: pa.ArrowInvalid) -> UserError:
    """Reads again, slowly, to name the place of what Arrow refused."""
    try:
        records = _records(request)
        _, header = next(records)
        previous = 1
        for line, fields in records:
            if len(fields) != len(header):
                long = line - previous > 100
                return UserError(
                    "a row has another number of columns than the header",
                    where=f"{request.path}, line {previous + 1 if long else line}",
                    expected=f"{len(header)} columns",
                    got=f"{len(fields)} columns" + (": perhaps a quote is opened and never closed" if long else ""),
                    fix="mend the row, or leave such rows out with on_bad = 'skip'",
                )
            previous = line
    except UserError as found:
        return found
    return UserError("the file cannot be read as CSV", where=request.path, got=str(error))
