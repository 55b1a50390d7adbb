"""Predicting a file: streamed in batches, written as it goes, whole or not at all."""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from pathways.inference import ROWS_AT_ONCE, check_columns, predict
from tasks.check import unknown
from tasks.encode import input_columns
from tasks.errors import UserError
from tasks.readers import Reader, open_reader

if TYPE_CHECKING:
    from pathways.model import Model

FORMATS = ("csv", "jsonl", "parquet")
ENDINGS = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".pq": "parquet"}
DIGITS = 7
"""Significant digits of numbers in csv and jsonl, all that single precision carries; Parquet has them as they are."""


def predict_file(
    model: Model,
    task: str,
    source: str | Path,
    output: str | Path | None = None,
    *,
    format: str | None = None,
    keep: Sequence[str] = (),
    encoding: str | None = None,
) -> int:
    """Predicts a task for every row of a file, in bounded memory.

    Args:
        source: any file the readers know, or "-" for standard input with CSV, TSV, JSON lines or Parquet.
        output: a file, which appears when it is whole; None or "-" for standard output.
        format: csv, jsonl or parquet; by default the output's ending tells, else csv.
        keep: columns of the source that are put first in the output. A prediction of the same name becomes
            `predicted_<name>`.
        encoding: of a text file; by default its byte order mark decides, else UTF-8.

    Returns:
        The number of rows.

    Raises:
        UserError: an unknown task, column or format, or a file that cannot be read or written.
    """
    model.entry(task)
    target = None if output is None or str(output) == "-" else Path(output)
    kind = format or (ENDINGS.get(target.suffix.lower()) if target else None) or "csv"
    if kind not in FORMATS:
        raise unknown("output format", kind, FORMATS, where="--format")
    if target is not None and target.exists() and Path(source).exists() and target.samefile(source):
        raise UserError(
            "The predictions would replace the rows they are made from; nothing was written.",
            where=str(target),
            expected="another file than the one that is read",
            fix="name another with -o; --keep takes columns of the rows along",
        )
    count = 0
    with opened(str(source), encoding) as (reader, folder), written(target) as file:
        writer = WRITERS[kind](file)
        for batch in chosen(model, task, reader, keep):
            table = predict(model, task, batch, folder=folder or _folder(batch))
            writer.write(joined(batch.select(list(keep)), table))
            count += batch.num_rows
        writer.close()
    return count


@contextmanager
def opened(source: str, encoding: str | None = None) -> Iterator[tuple[Reader, str | None]]:
    """The reader of a file, and where relative paths start if that is not the file's folder.

    Standard input is first copied to a temporary file: formats are told by their first bytes, and errors name lines.
    """
    if source != "-":
        yield open_reader(source, rows_per_batch=ROWS_AT_ONCE, encoding=encoding), None
        return
    with tempfile.TemporaryDirectory(prefix="pathways-") as folder:
        path = Path(folder) / "stdin"
        with path.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        try:
            kind = format_of(path)
            yield open_reader(str(path), format=kind, rows_per_batch=ROWS_AT_ONCE, encoding=encoding), str(Path.cwd())
        except UserError as error:
            where = (error.where or "").replace(str(path), "standard input") or None
            raise UserError(error.problem, where=where, expected=error.expected, got=error.got, fix=error.fix) from None


def format_of(path: Path) -> str:
    """Parquet by its magic, JSON lines by a brace, else a table with tabs or commas, whichever the first line has."""
    with path.open("rb") as file:
        head = file.read(1 << 16)
    if not head.strip():
        raise UserError("there is nothing on standard input", expected="CSV or JSON lines", got=f"{len(head)} bytes")
    if head.startswith(b"PAR1"):
        return "parquet"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"{"):
        return "jsonl"
    line = text.split(b"\n", 1)[0]
    return "tsv" if line.count(b"\t") > line.count(b",") else "csv"


def chosen(model: Model, task: str, reader: Reader, keep: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The columns needed; a missing one is an error that suggests the nearest."""
    fitted = model.entry(task).fitted
    check_columns(fitted, reader.columns, reader.path)
    for name in keep:
        if name not in reader.columns:
            raise unknown("column to keep named", name, reader.columns, where=reader.path)
    yield from reader.batches(list(dict.fromkeys([*input_columns(fitted), *keep])))


def joined(kept: pa.RecordBatch, table: pa.Table) -> pa.Table:
    """The kept columns, then the predictions."""
    columns = dict(zip(kept.schema.names, kept.columns, strict=True))
    for name in table.column_names:
        columns[f"predicted_{name}" if name in kept.schema.names else name] = table.column(name)
    return pa.table(columns)


class Writer(Protocol):
    """Takes tables of one schema, batch by batch."""

    def __init__(self, file: IO[bytes]) -> None: ...

    def write(self, table: pa.Table) -> None: ...

    def close(self) -> None: ...


class CsvWriter:
    """Lists are written as JSON within their cell."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self._headed = file, False

    def write(self, table: pa.Table) -> None:
        lines = _Lines(self.file)
        writer = csv.writer(lines, lineterminator="\n")
        if not self._headed:
            writer.writerow(table.column_names)
            self._headed = True
        columns = [[_cell(value) for value in column.to_pylist()] for column in table.columns]
        writer.writerows(zip(*columns, strict=True))

    def close(self) -> None:
        self.file.flush()


class _Lines:
    """Text lines into a file of bytes."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file

    def write(self, text: str) -> int:
        return self.file.write(text.encode("utf-8", "surrogatepass"))


class JsonWriter:
    """One object per line."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file

    def write(self, table: pa.Table) -> None:
        for row in table.to_pylist():
            content = {name: _rounded(value) for name, value in row.items()}
            line = json.dumps(content, ensure_ascii=False, default=_as_text) + "\n"
            self.file.write(line.encode("utf-8", "surrogatepass"))

    def close(self) -> None:
        self.file.flush()


class ParquetWriter:
    """The first batch's types hold for all."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self._writer: pq.ParquetWriter | None = None

    def write(self, table: pa.Table) -> None:
        writer = self._writer or pq.ParquetWriter(self.file, table.schema)
        self._writer = writer
        try:
            writer.write_table(table.cast(writer.schema))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise UserError(
                "a kept column changes its type within the file", got=str(error), fix="write csv or jsonl"
            ) from None

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self.file.flush()


WRITERS: dict[str, type[Writer]] = {"csv": CsvWriter, "jsonl": JsonWriter, "parquet": ParquetWriter}


@contextmanager
def written(target: Path | None) -> Iterator[IO[bytes]]:
    """Standard output, or a file that replaces `target` when all went well."""
    if target is None:
        sys.stdout.flush()
        yield sys.stdout.buffer
        return
    partial = target.with_name(target.name + ".partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError("the output cannot be written", where=str(target), got=reason) from error
    finally:
        partial.unlink(missing_ok=True)


def _folder(batch: pa.RecordBatch) -> str:
    return (batch.schema.metadata or {}).get(b"folder", b".").decode()


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def _cell(value: Any) -> Any:
    if isinstance(value, list):
        return json.dumps(_rounded(value), ensure_ascii=False, default=_as_text)
    return value.hex() if isinstance(value, bytes) else _rounded(value)


def _as_text(value: Any) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)
