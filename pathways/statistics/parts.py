"""The Parquet files of one table: their names, which of them count, and how they are read and written.

A record is one file, `<step>-<phase>.parquet`. Files of the same level are merged into one of the next,
`<first>-<last>-<phase>-<level>.parquet`, which is written before its sources are deleted: a file whose steps lie within
those of a bigger one is therefore a leftover, and no reader looks at it.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from pathways.statistics.counts import SCHEMAS
from pathways.statistics.files import Files
from tasks.errors import UserError

_NAME = re.compile(r"(?P<first>\d+)(-(?P<last>\d+))?-(?P<phase>[a-z]+)(-(?P<level>\d))?\.parquet")


@dataclass(frozen=True)
class Part:
    """One file: the records of a phase from step `first` to step `last`."""

    table: str
    phase: str
    first: int
    last: int
    level: int = 0

    @property
    def key(self) -> str:
        if self.level == 0:
            return f"{self.table}/{self.first:010d}-{self.phase}.parquet"
        return f"{self.table}/{self.first:010d}-{self.last:010d}-{self.phase}-{self.level}.parquet"

    def within(self, other: Part) -> bool:
        """Whether `other` holds all that this one holds."""
        return (
            self != other
            and self.phase == other.phase
            and other.first <= self.first
            and self.last <= other.last
            and self.level <= other.level
        )


def parse(key: str) -> Part | None:
    """The part that a key names, `None` for a foreign file."""
    table, _, name = key.partition("/")
    match = _NAME.fullmatch(name)
    if table not in SCHEMAS or match is None:
        return None
    first = int(match["first"])
    return Part(table, match["phase"], first, int(match["last"] or first), int(match["level"] or 0))


def list_parts(files: Files, table: str) -> tuple[list[Part], list[Part]]:
    """The parts of a table in order of their steps, and the leftovers."""
    found = sorted(filter(None, map(parse, files.list(f"{table}/"))), key=lambda part: (part.first, part.last))
    big = [part for part in found if part.level > 0]
    leftovers = {part for part in found if any(part.within(other) for other in big)}
    return [part for part in found if part not in leftovers], list(leftovers)


def read_part(files: Files, part: Part) -> pa.Table:
    """Raises FileNotFoundError where it is gone, UserError where it is damaged."""
    data = files.read(part.key)
    names = [field.name for field in SCHEMAS[part.table] if pa.types.is_dictionary(field.type)]
    try:
        return pq.read_table(io.BytesIO(data), read_dictionary=names).select(SCHEMAS[part.table].names)
    except (pa.ArrowInvalid, OSError, KeyError) as error:
        raise UserError(
            "a file of routing statistics is damaged",
            where=f"{files}/{part.key}",
            expected=f"Parquet with the columns {', '.join(SCHEMAS[part.table].names)}",
            got=str(error).splitlines()[0],
            fix="delete this file; only the records in it are lost",
        ) from None


def encode(table: pa.Table) -> bytes:
    """The table as Parquet."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_statistics=False)
    return sink.getvalue()
