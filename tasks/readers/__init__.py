"""Readers: a path becomes a stream of `pyarrow.RecordBatch`, whatever the format, in bounded memory.

Every batch's schema metadata holds `file` and `folder`, so that a relative path in a cell can be resolved.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import pyarrow as pa

from tasks.check import listing, unknown
from tasks.errors import UserError
from tasks.readers import conllu, csv_file, files, idx, image_folder, jsonl, parquet
from tasks.readers.files import Request
from tasks.spec import OnBad

FORMATS: dict[str, ModuleType] = {
    "csv": csv_file,
    "tsv": csv_file,
    "jsonl": jsonl,
    "parquet": parquet,
    "conllu": conllu,
    "images": image_folder,
    "idx": idx,
}
"""Name -> module with `columns(request)` and `batches(request, wanted)`."""

ENDINGS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".conllu": "conllu",
}

SPREADSHEETS = (".xlsx", ".xls", ".ods", ".numbers")
"""Endings of what people have where they were asked for a CSV."""


class Reader:
    """One file, several files of one format, or a folder, read as batches; made by `open_reader`.

    Attributes:
        path: as it was given.
        files: what it means, sorted.
        format: a key of `FORMATS`.
        columns: the names of the columns.
        skipped: rows left out by the last pass over `batches`, with `on_bad="skip"`.
    """

    def __init__(self, path: str, format: str | None, rows_per_batch: int, on_bad: OnBad, encoding: str | None) -> None:
        self.path = path
        self.files = tuple(files.find(path))
        self.format = format or format_of(self.files[0])
        if self.format not in FORMATS:
            raise unknown("format", self.format, FORMATS, where=path)
        self._module = FORMATS[self.format]
        self._requests = [Request(file, rows_per_batch, on_bad, encoding) for file in self.files]
        self.columns: tuple[str, ...] = self._module.columns(self._requests[0])
        for request in self._requests[1:]:
            self._check_columns(request)
        self._first_fingerprint = self.fingerprint()

    @property
    def skipped(self) -> int:
        return sum(request.skipped for request in self._requests)

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Streams the rows, `columns` only if given; each call starts anew. No row at all is a UserError."""
        wanted = tuple(columns) if columns is not None else self.columns
        for name in wanted:
            if name not in self.columns:
                raise unknown("column", name, self.columns, where=self.path)
        seen = 0
        for request in self._requests:
            place = {"file": request.path, "folder": _folder(request.path)}
            for batch in self._module.batches(request, wanted):
                seen += batch.num_rows
                yield batch.replace_schema_metadata(place)
        if seen == 0:
            raise UserError(
                "there are no rows",
                where=self.path,
                expected="at least one row" + (" after the header" if self.format in ("csv", "tsv") else ""),
                got=f"{self.skipped} rows, all of them skipped as bad" if self.skipped else "0 rows",
            )

    def fingerprint(self) -> str:
        """Changes when a file does: its size, time of last change, head and tail."""
        return ";".join(files.digest(file) for file in self.files)

    def check_unchanged(self) -> None:
        """Raises UserError if a file has changed since the reader was opened."""
        if self.fingerprint() != self._first_fingerprint:
            raise UserError(
                "the data changed while it was in use",
                where=self.path,
                expected="the same file from the start of training to its end",
                fix="start again with the new file, or put the old one back",
            )

    def _check_columns(self, request: Request) -> None:
        found = self._module.columns(request)
        if set(found) != set(self.columns) and self.format != "jsonl":
            raise UserError(
                "the files of the pattern differ in their columns",
                where=request.path,
                expected=listing(self.columns),
                got=listing(found),
            )


def open_reader(
    path: str,
    *,
    format: str | None = None,
    rows_per_batch: int = 4096,
    on_bad: OnBad = "stop",
    encoding: str | None = None,
) -> Reader:
    """Opens a file, a folder or a glob.

    Args:
        path: CSV, TSV, JSON lines, CoNLL-U (each also `.gz`), Parquet, IDX, or a folder of images by class.
        format: a key of `FORMATS`, when the ending does not tell.
        rows_per_batch: the most rows in a batch.
        on_bad: what a row that cannot be read does.
        encoding: of a text file; by default its byte order mark decides, else UTF-8.

    Raises:
        UserError: missing, empty, not of the format.
    """
    return Reader(os.fspath(path), format, rows_per_batch, on_bad, encoding)


def format_of(path: str) -> str:
    """The format of a file by its ending, or of a folder by what is in it."""
    if idx.is_idx(path):
        return "idx"
    if Path(path).is_dir():
        return "images"
    ending = Path(files.bare_name(path)).suffix
    if ending not in ENDINGS:
        raise UserError(
            "the format of this file is not known by its ending",
            where=path,
            expected=f"an ending such as {listing(ENDINGS)}",
            got=ending or "no ending",
            fix="save the sheet as CSV, and give that"
            if ending.lower() in SPREADSHEETS
            else f"give it such an ending; a configuration may say the format too: one of {listing(FORMATS)}",
        )
    return ENDINGS[ending]


def resolve(source: Reader | pa.RecordBatch, value: str) -> str:
    """The absolute path of a file named in a cell: relative paths are relative to the folder of the table's file."""
    folder = _folder(source.files[0]) if isinstance(source, Reader) else source.schema.metadata[b"folder"].decode()
    return os.path.normpath(Path(folder) / value)


def _folder(path: str) -> str:
    place = Path(path).absolute()
    return str(place if place.is_dir() else place.parent)
