"""The commands, their arguments and their help. Nothing heavy is imported here."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from typing import Any, NoReturn

from pathways.cli.life import add_life, version
from pathways.cli.overrides import read_fields
from pathways.cli.suggestions import add_suggest
from tasks.check import nearest, unknown
from tasks.errors import UserError

FORMATS = ("table", "csv", "json")
KINDS = ("classification", "multilabel", "regression", "tagging", "distribution")
SPLITS = ("train", "valid", "test")

ABOUT = """\
One sparsely activated model for many tasks: train it, add a task, ask it, ask its routing.

Train a first model and look at it:

  pathways train configs/quickstart.toml --out runs/demo
  pathways eval runs/demo
  pathways add runs/demo --name spam --data spam.csv --target label
  pathways stats runs/demo --plot

`pathways COMMAND --help` says more about each command, with an example.
"""


class Parser(argparse.ArgumentParser):
    """Mistakes become a UserError, told like all others."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, allow_abbrev=False, formatter_class=Help, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(message[:1].upper() + message[1:] + ".", fix=f"see `{self.prog} --help`")


class Help(argparse.RawDescriptionHelpFormatter):
    """Wide enough that names such as `--train.learning_rate` stand beside their text."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)


class Version(argparse.Action):
    """Prints the version and leaves; it is looked up only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib import metadata

        try:
            number = metadata.version("pathways-moe")
        except metadata.PackageNotFoundError:
            number = "(not installed)"
        print(f"pathways {number}")
        parser.exit()


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command and its arguments.

    Raises:
        UserError: an unknown command or flag, with the nearest named; a missing or wrong argument.
    """
    parser, commands = build()
    words = list(sys.argv[1:] if argv is None else argv)
    first = next((word for word in words if not word.startswith("-")), None)
    if first is not None and first not in commands:
        raise unknown("command", first, commands, where="pathways")
    found, rest = parser.parse_known_args(words)
    if rest:
        used = commands[found.command] if found.command else parser
        known = [flag for action in used._actions for flag in action.option_strings if flag.startswith("--")]
        flag = rest[0].partition("=")[0]
        guess = nearest(flag, known) if flag.startswith("-") else None
        what = "flag" if flag.startswith("-") else "argument"
        raise UserError(
            f"There is no such {what} here.",
            where=used.prog,
            got=" ".join(rest),
            fix=f"did you mean {guess}?" if guess else f"see `{used.prog} --help`",
        )
    if found.command is None:
        parser.print_help()
        parser.exit()
    return found


def build() -> tuple[Parser, dict[str, Parser]]:
    """The parser and those of its commands."""
    parser = Parser(prog="pathways", description=ABOUT)
    parser.add_argument("--version", action=Version, nargs=0, help="print the version")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    group = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands", parser_class=Parser)
    commands: dict[str, Parser] = {}

    def command(name: str, summary: str, text: str, example: str) -> Parser:
        about = textwrap.dedent(text).strip() + "\n\nexample:\n  " + textwrap.dedent(example).strip()
        made = group.add_parser(name, help=summary, description=about)
        made.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        commands[name] = made
        return made

    for add in (
        _train,
        _lr_find,
        _add,
        _remove,
        _undo,
        _predict,
        _eval,
        add_suggest,
        _tasks,
        _show,
        _stats,
        _log,
        _compact,
        _verify,
    ):
        add(command)
    add_life(command)
    return parser, commands


def _model(parser: Parser, at: bool = False) -> None:
    parser.add_argument("model", metavar="MODEL", help="the model's folder, or a gs:// or s3:// URL")
    if at:
        parser.add_argument("--at", type=version, metavar="VERSION", help="its number or name; see `pathways log`")


def _format(parser: Parser) -> None:
    parser.add_argument("--format", choices=FORMATS, default="table", help="table by default")


def _config(parser: Parser, out: str) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a TOML file; see configs/ and docs/tasks.md")
    parser.add_argument("--out", required=True, metavar="DIR", help=out)
    groups: dict[str, Any] = {}
    for item in read_fields():
        if item.section not in groups:
            groups[item.section] = parser.add_argument_group(f"overrides of [{item.section}]")
        text = f"{item.help} [{item.default}]" if item.default else item.help
        groups[item.section].add_argument(
            f"--{item.name}",
            dest=f"set:{item.name}",
            metavar=item.metavar,
            default=argparse.SUPPRESS,
            help=text.replace("%", "%%"),
        )


def _train(command: Any) -> None:
    parser = command(
        "train",
        "train one model on all tasks of a configuration",
        """
        Trains one model on all tasks of a configuration. A run that was stopped goes on where it was; progress,
        metrics.jsonl, TensorBoard events and the resolved configuration are written to the model's folder.
        """,
        "pathways train configs/quickstart.toml --out runs/demo --train.steps 500 --model.experts '{mlp = 32}'",
    )
    parser.usage = "%(prog)s CONFIG --out DIR [--restart] [--profile] [--quiet] [--SECTION.FIELD VALUE ...]"
    _config(parser, "the model's folder, made where absent")
    parser.add_argument("--restart", action="store_true", help="begin again, discarding the run or model in DIR")
    parser.add_argument("--profile", action="store_true", help="record ten steps in DIR/profile, for Perfetto or xprof")
    parser.add_argument("--quiet", action="store_true", help="print no progress")


def _lr_find(command: Any) -> None:
    parser = command(
        "lr-find",
        "sweep the learning rate and suggest one",
        "Trains for a short while at a growing learning rate, draws the loss, and suggests a rate for training.",
        "pathways lr-find configs/quickstart.toml --out runs/rates",
    )
    parser.usage = "%(prog)s CONFIG --out DIR [--SECTION.FIELD VALUE ...]"
    _config(parser, "where lr_find.png goes, made where absent")


def _add(command: Any) -> None:
    parser = command(
        "add",
        "add a task to a model; the old ones stay bit for bit as they were",
        """
        Adds a task through the experts that exist and a few new ones, and prints its card: its score beside three
        baselines, the time, the parameters, the experts reused. Kinds of columns are inferred from the file where
        they are not said. Nothing old changes: that is checked before the commit.
        """,
        "pathways add runs/demo --name spam --data spam.csv --target label --inputs text:text sender:category",
    )
    _model(parser)
    parser.add_argument("--name", required=True, help="the new task's name")
    parser.add_argument("--data", required=True, metavar="FILE", help="its training rows: a file, a folder or a glob")
    parser.add_argument("--target", required=True, nargs="+", metavar="COLUMN", help="the column or columns to predict")
    parser.add_argument("--inputs", nargs="+", default=[], metavar="COLUMN[:KIND]", help="all other columns by default")
    parser.add_argument("--ignore", nargs="+", default=[], metavar="COLUMN", help="columns never used")
    parser.add_argument("--kind", choices=KINDS, help="of the target; inferred by default")
    parser.add_argument("--valid", metavar="FILE", help="validation rows; a tenth of the data by default")
    parser.add_argument("--test", metavar="FILE", help="test rows; a tenth of the data by default")
    parser.add_argument("--group", metavar="COLUMN", help="evaluate each value of this column apart")
    parser.add_argument("--where", metavar="COLUMN=VALUE", help="use only these rows")
    parser.add_argument("--encoding", help="of text files; UTF-8 by default")
    parser.add_argument("--on-bad", choices=("stop", "skip"), help="what an undecodable row does; stop by default")
    parser.add_argument("--new-experts", type=int, default=2, metavar="N", help="own experts a layer, at most [2]")
    parser.add_argument("--candidates", type=int, default=8, metavar="M", help="experts to reuse a layer, at most [8]")
    parser.add_argument("--no-own-encoder", action="store_true", help="train no copy of the encoders (words, ...)")
    parser.add_argument("--steps", type=int, metavar="N", help="of a fine-tuning; by the number of rows by default")
    walks = ("none", "evolution", "reinforce")
    parser.add_argument("--search", choices=walks, default="evolution", help="how candidates are chosen [evolution]")
    efforts = ("low", "medium", "high")
    parser.add_argument("--effort", choices=efforts, default="medium", help="how many candidates are tried [medium]")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done and what it would cost, no more")
    parser.add_argument("--max-parameters", type=int, metavar="N", help="the most parameters that are the task's own")
    parser.add_argument("--seed", type=int, default=0, help="of the search and the training [0]")
    parser.add_argument("--quiet", action="store_true", help="print no progress; the card is printed all the same")


def _remove(command: Any) -> None:
    parser = command(
        "remove",
        "take a task out of a model",
        "Takes a task and what is its alone out of the model. Shared experts stay, and `pathways undo` brings it back.",
        "pathways remove runs/demo spam",
    )
    _model(parser)
    parser.add_argument("task", metavar="TASK")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be freed, and who leans on it")


def _undo(command: Any) -> None:
    parser = command(
        "undo",
        "go back to an older version",
        """
        Makes the content of an older version the newest one: that before the last change by default. An undo is a
        change too: a second one brings back what the first took, and `--to` goes further back.
        """,
        "pathways undo runs/demo --to 2",
    )
    _model(parser)
    parser.add_argument("--to", type=version, metavar="VERSION", help="see `pathways log`; the one before by default")


def _predict(command: Any) -> None:
    parser = command(
        "predict",
        "predict a task for the rows of a file",
        """
        Writes one output row for every input row, in order, with probabilities. Columns that the task does not use
        are ignored; a missing one is an error. Reads CSV, TSV, JSON lines, Parquet, CoNLL-U, IDX, a folder of images,
        or with - standard input (CSV, TSV, JSON lines or Parquet).
        """,
        "pathways predict runs/demo wine wine.csv --keep id -o predictions.csv",
    )
    _model(parser, at=True)
    parser.add_argument("task", metavar="TASK")
    parser.add_argument("file", metavar="FILE", help="the rows, or - for standard input")
    parser.add_argument("-o", "--output", metavar="OUT", help="a file; standard output by default")
    formats = ("csv", "jsonl", "parquet")
    parser.add_argument("--format", choices=formats, help="of the output; by the ending of OUT, else csv")
    parser.add_argument("--encoding", help="of a text file; UTF-8 by default")
    parser.add_argument(
        "--keep", action="append", default=[], metavar="COL", help="put this input column first; repeat"
    )


def _eval(command: Any) -> None:
    parser = command(
        "eval",
        "metrics of a model's tasks, what went wrong, for whom",
        """
        Evaluates tasks on a split, without dropping a row. With one task (or --details) it also shows figures per
        class and per group. A label that training never had counts as wrong.
        """,
        "pathways eval runs/demo wine digits --worst 20 --plots pictures",
    )
    _model(parser, at=True)
    parser.add_argument("tasks", metavar="TASK", nargs="*", default=[], help="all by default")
    parser.add_argument("--split", choices=SPLITS, default="test", help="test by default")
    parser.add_argument("--data", metavar="FILE", help="evaluate on this file instead of the split's own")
    parser.add_argument(
        "--limit", type=int, default=0, metavar="N", help="at most N rows of each task, a seeded choice"
    )
    parser.add_argument("--worst", type=int, default=0, metavar="N", help="show the N worst mistakes of each task")
    parser.add_argument("--details", action="store_true", help="per class and per group, for every task")
    parser.add_argument("--plots", metavar="DIR", help="draw a confusion picture of each task with classes")
    parser.add_argument("--no-statistics", action="store_true", help="do not record the routing")
    _format(parser)


def _tasks(command: Any) -> None:
    parser = command(
        "tasks",
        "the tasks in a model",
        "One line per task: its kind, inputs, rows, figure, origin, experts used and private parameters.",
        "pathways tasks runs/demo --format csv",
    )
    _model(parser, at=True)
    _format(parser)


def _show(command: Any) -> None:
    parser = command(
        "show",
        "a model's parameters, or one task's pathway",
        "Without a task: parameters, layers, experts. With one: its data, its pathway as a drawing, its card.",
        "pathways show runs/demo wine",
    )
    _model(parser, at=True)
    parser.add_argument("task", metavar="TASK", nargs="?")


def _stats(command: Any) -> None:
    parser = command(
        "stats",
        "which experts did what, for which task",
        """
        The routing statistics that training and evaluation recorded: tables on the terminal, SQL, or pictures. The
        tables are routing, pairs, entropy (as recorded) and experts, tasks, layers (derived); docs/statistics.md
        explains every column. `usage` is the share of each expert in each task and layer.
        """,
        """pathways stats runs/demo --sql "select task, sum(rows) as n from routing group by task order by n desc" """,
    )
    _model(parser)
    tables = ("usage", "experts", "tasks", "layers", "routing", "pairs", "entropy")
    parser.add_argument("--table", choices=tables, help="print this one; layers, tasks and experts by default")
    parser.add_argument("--sql", metavar="QUERY", help="one SELECT of DuckDB over the tables")
    parser.add_argument("--plot", nargs="?", const="", metavar="DIR", help="draw PNGs; into MODEL/plots by default")
    parser.add_argument("--phase", choices=("train", "valid", "test"), help="the first recorded by default")
    _format(parser)


def _log(command: Any) -> None:
    parser = command(
        "log",
        "the versions of a model",
        "Every version that can be opened, oldest first, with what it wrote. `--at N` of other commands opens one.",
        "pathways log runs/demo",
    )
    _model(parser)
    _format(parser)


def _compact(command: Any) -> None:
    parser = command(
        "compact",
        "give the space of old versions back",
        """
        Drops all versions but the newest, those that `pathways pin` gave a name and those listed with --keep, and the
        space that only they used. Without --keep, it says what would go and wants --yes: there is no way back to a
        version that is gone.
        """,
        "pathways compact runs/demo --keep 3 5",
    )
    _model(parser)
    parser.add_argument("--keep", type=int, nargs="+", default=[], metavar="VERSION", help="keep these versions too")
    parser.add_argument("--yes", action="store_true", help="without --keep: drop all versions but the newest")


def _verify(command: Any) -> None:
    parser = command(
        "verify",
        "check every stored byte against its digest",
        "Reads the whole model and names what is damaged. The exit status is 1 if anything is.",
        "pathways verify runs/demo",
    )
    _model(parser, at=True)
