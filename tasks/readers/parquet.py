"""Parquet, a row group at a time. An image or audio struct `{bytes, path}` becomes a binary column."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.errors import UserError
from tasks.readers.files import Request, reading

MAX_BYTES = 1 << 26
"""About how large a batch may be; rows that hold images make smaller batches."""


def columns(request: Request) -> tuple[str, ...]:
    with _open(request) as file:
        return tuple(file.schema_arrow.names)


def batches(request: Request, wanted: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Batches with the file's own types."""
    request.skipped = 0
    with reading(request.path), _open(request) as file:
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        row_bytes = max((g.total_byte_size // max(1, g.num_rows) for g in groups), default=0)
        rows = max(1, min(request.rows_per_batch, MAX_BYTES // max(1, row_bytes)))
        try:
            for batch in file.iter_batches(batch_size=rows, columns=list(wanted), use_threads=False):
                yield pa.RecordBatch.from_arrays([_plain(batch.column(name)) for name in wanted], names=list(wanted))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise UserError("the Parquet file is damaged", where=request.path, got=str(error)) from error


def _open(request: Request) -> pq.ParquetFile:
    with reading(request.path):
        try:
            return pq.ParquetFile(request.path, memory_map=False, pre_buffer=False)
        except pa.ArrowInvalid as error:
            raise UserError("the file is not Parquet, or it is damaged", where=request.path, got=str(error)) from error


def _plain(array: pa.Array) -> pa.Array:
    if pa.types.is_dictionary(array.type):
        return array.cast(array.type.value_type)
    if pa.types.is_struct(array.type) and "bytes" in {field.name for field in array.type}:
        return array.field("bytes")
    return array
