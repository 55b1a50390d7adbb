"""`pathways suggest`: its arguments, and how what it finds is shown. Nothing heavy is imported before it runs."""

from __future__ import annotations

import sys
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from pathways.cli.life import version

if TYPE_CHECKING:
    from pathways.suggesting.suggest import Suggestions

FORMATS = ("table", "csv", "json")


def add_suggest(command: Any) -> None:
    """Adds the command to the parser."""
    parser = command(
        "suggest",
        "name the unlabelled rows whose labels would help a task most",
        """
        Names the rows of a file that a person should label next, best first: those the model doubts most, chosen so
        that they are unlike each other. `score` is the doubt, from 0 (certain) to 1; for a target of numbers, how
        unlike a row is to those that the task knows. Rows that have a label already are passed over. With -o, the
        rows are written to a file with the target left blank, to be filled in.
        """,
        "pathways suggest runs/demo spam --pool unlabelled.csv -n 50 --keep text -o to_label.csv",
    )
    parser.add_argument("model", metavar="MODEL", help="the model's folder, or a gs:// or s3:// URL")
    parser.add_argument("task", metavar="TASK")
    parser.add_argument(
        "--pool", required=True, metavar="FILE", help="the rows to choose from, or - for standard input"
    )
    parser.add_argument("-n", type=int, default=50, metavar="N", help="how many rows to name [50]")
    parser.add_argument("--keep", action="append", default=[], metavar="COL", help="show this column too; repeat")
    parser.add_argument("-o", "--output", metavar="OUT", help="write a .csv, .jsonl or .parquet to fill in")
    parser.add_argument("--encoding", help="of a text file; UTF-8 by default")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn by chance [0]")
    parser.add_argument("--at", type=version, metavar="VERSION", help="its number or name; see `pathways log`")
    parser.add_argument("--format", choices=FORMATS, default="table", help="of what is printed; table by default")


def run_suggest(args: Namespace) -> None:
    """Prints the rows on standard output, what to know of them on standard error, and writes the file to fill in."""
    from pathways.cli.commands import set_up_jax
    from pathways.model import Model
    from pathways.suggesting.sheet import check_sheet, write_sheet
    from pathways.suggesting.suggest import suggest

    if args.output:
        check_sheet(args.output)
    set_up_jax()
    model = Model.open(args.model, args.at)
    options = {"seed": args.seed, "keep": args.keep, "encoding": args.encoding}
    found = suggest(model, args.task, args.pool, args.n, **options)
    show(found, args.keep, args.format)
    for note in found.notes:
        print(note, file=sys.stderr)
    if args.output:
        blank = ", ".join(write_sheet(found, model.entry(args.task).fitted, args.output))
        print(f"{len(found.table):,} rows in {args.output}: fill in {blank}", file=sys.stderr)


def show(found: Suggestions, keep: list[str], format: str) -> None:
    """Prints the rows, best first, with the columns kept."""
    from pathways import report

    kinds: dict[str, report.Kind] = {"row": "integer", "score": "number", "probability": "percent"}
    own = found.table.column_names
    columns = [report.Column(name, kinds.get(name, "text")) for name in own]
    columns += [report.Column(f"pool_{name}" if name in own else name) for name in keep]
    values = [*found.table.columns, *(found.cells.column(name) for name in keep)]
    cells = [[_cell(value, format) for value in column.to_pylist()] for column in values]
    title = f"{found.task}: {len(found.table):,} of {found.tally.rows:,} rows to label next"
    report.table(title, columns, zip(*cells, strict=True), format=format)


def _cell(value: Any, format: str) -> Any:
    """Several labels, tags or numbers in one cell, but as they are in JSON."""
    if not isinstance(value, list) or format == "json":
        return value
    from pathways import report

    return ", ".join(report.number(item) if isinstance(item, float) else str(item) for item in value)
