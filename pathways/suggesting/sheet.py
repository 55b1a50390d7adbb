"""The rows that are suggested as a file to fill in: what the task reads, and its target, blank."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from pathways.inference_files import ENDINGS, WRITERS, written
from pathways.suggesting.suggest import Suggestions
from tasks.errors import UserError
from tasks.fitted import FittedTask


def check_sheet(path: str | Path) -> str:
    """The format of a file that is to be made, by its ending.

    Raises:
        UserError: an ending that is none of csv, jsonl and parquet, no folder for it, or a file that is there: it may
            hold labels.
    """
    path = Path(path)
    if path.exists():
        raise UserError(
            "There is a file of this name already, and it may hold labels.",
            where=str(path),
            fix="give another name, or move it away",
        )
    if not path.parent.is_dir():
        raise UserError("The folder of this file does not exist.", where=str(path), expected=f"a folder {path.parent}")
    if path.suffix.lower() not in ENDINGS:
        raise UserError("The ending tells no format.", where=str(path), expected=", ".join(ENDINGS), got=path.suffix)
    return ENDINGS[path.suffix.lower()]


def write_sheet(found: Suggestions, fitted: FittedTask, path: str | Path) -> tuple[str, ...]:
    """Writes the rows, best first, and returns the names of the columns to fill in.

    Raises:
        UserError: as `check_sheet`; an input that holds pictures themselves, for which no cell has room; a file that
            cannot be written.
    """
    kind, targets = check_sheet(path), fitted.task.target.columns
    for name in found.cells.column_names:
        if pa.types.is_binary(found.cells.schema.field(name).type) and kind != "parquet":
            raise UserError(
                "A column holds pictures or sounds themselves, not their paths.",
                where=f"column {name}",
                fix="leave -o out and label by the row numbers, or give OUT the ending .parquet",
            )
    blank = pa.nulls(len(found.cells), pa.string())
    kept = found.cells.select([name for name in found.cells.column_names if name not in targets])
    for name in targets:
        kept = kept.append_column(name, blank)
    with written(Path(path)) as file:
        writer = WRITERS[kind](file)
        writer.write(kept)
        writer.close()
    return targets
