"""CoNLL-U: a row is a sentence; each column a list with one string per word.

Comments, multiword ranges (`3-4`) and empty nodes (`5.1`) are left out. https://universaldependencies.org/format.html
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa

from tasks.errors import UserError
from tasks.readers import files
from tasks.readers.files import Request

FIELDS = {"tokens": 1, "lemma": 2, "upos": 3, "xpos": 4, "feats": 5, "head": 6, "deprel": 7}
"""Column -> place in a CoNLL-U line."""


def columns(request: Request) -> tuple[str, ...]:
    return tuple(FIELDS)


def batches(request: Request, wanted: Sequence[str]) -> Iterator[pa.RecordBatch]:
    request.skipped = 0
    schema = pa.schema([(name, pa.list_(pa.string())) for name in wanted])
    rows: list[list[list[str]]] = []

    def batch() -> pa.RecordBatch:
        arrays = [
            pa.array([[word[FIELDS[name]] for word in sentence] for sentence in rows], schema.field(name).type)
            for name in wanted
        ]
        return pa.RecordBatch.from_arrays(arrays, schema=schema)

    for sentence in _sentences(request):
        rows.append(sentence)
        if len(rows) == request.rows_per_batch:
            yield batch()
            rows = []
    if rows:
        yield batch()


def _sentences(request: Request) -> Iterator[list[list[str]]]:
    words: list[list[str]] = []
    broken = False
    for number, line in files.lines(request):
        line = line.rstrip("\r\n")
        if not line.strip():
            if words and not broken:
                yield words
            words, broken = [], False
        elif not line.startswith("#") and not broken:
            word = line.split("\t")
            if len(word) != 10:
                broken = True
                request.bad(_not_ten(request.path, number, len(word)))
            elif word[0].isdigit():
                words.append(word)
    if words and not broken:
        yield words


def _not_ten(path: str, line: int, fields: int) -> UserError:
    return UserError(
        "a CoNLL-U line does not have ten fields",
        where=f"{path}, line {line}",
        expected="10 fields with tabs between",
        got=f"{fields}",
        fix="mend the line, or leave such sentences out with on_bad = 'skip'",
    )
