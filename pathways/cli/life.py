"""Arguments of the commands about the life of a task. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

FORMATS = ("table", "csv", "json")


def version(text: str) -> int | str:
    """A version: its number, or the name it was pinned by."""
    return int(text) if text.isdecimal() else text


def add_life(command: Callable[..., Any]) -> None:
    """Adds them all.

    Args:
        command: `(name, summary, text, example) -> parser`, as in `pathways.cli.parser.build`.
    """
    for add in (_update, _copy, _rename, _lineage, _who_uses, _diff, _pin, _collect):
        add(command)


def _model(parser: Any, at: bool = False) -> None:
    parser.add_argument("model", metavar="MODEL", help="the model's folder, or a gs:// or s3:// URL")
    if at:
        parser.add_argument("--at", type=version, metavar="VERSION", help="a version's number or name")


def _update(command: Callable[..., Any]) -> None:
    parser = command(
        "update",
        "train a task on with more rows",
        """
        Goes on training a task that was added, from where it stands: only what is its own moves. The card says the
        score before and after on the same test rows; one that is worse on the validation rows is refused. It learns
        from these rows alone: a glob that matches the old file, too, has it learn from both.
        """,
        "pathways update runs/demo spam --data 'spam-*.csv' --test spam-test.csv",
    )
    _model(parser)
    parser.add_argument("task", metavar="TASK")
    parser.add_argument("--data", required=True, metavar="FILE", help="its new rows: a file, a folder or a glob")
    parser.add_argument("--valid", metavar="FILE", help="validation rows; the task's own file, or cut from the data")
    parser.add_argument("--test", metavar="FILE", help="held rows; the task's own file, or cut from the data")
    parser.add_argument("--steps", type=int, metavar="N", help="training steps; by the number of rows by default")
    parser.add_argument("--seed", type=int, default=0, help="of the training [0]")
    parser.add_argument("--force", action="store_true", help="commit it even if it is worse on the validation rows")
    parser.add_argument("--quiet", action="store_true", help="print no progress; the card is printed all the same")


def _copy(command: Callable[..., Any]) -> None:
    parser = command(
        "copy",
        "a second task that computes what another does",
        """
        Gives a copy of a task, under a new name: a head, norms, a gate and rows of encoders of its own, over the same
        experts. It computes the same bits, which is checked before the commit.
        """,
        "pathways copy runs/demo spam spam_strict",
    )
    _model(parser)
    parser.add_argument("task", metavar="TASK")
    parser.add_argument("new", metavar="NEW", help="the copy's name")


def _rename(command: Callable[..., Any]) -> None:
    parser = command(
        "rename",
        "give a task another name",
        "The task computes the same bits under its new name. Statistics recorded before stay under the old one.",
        "pathways rename runs/demo spam junk",
    )
    _model(parser)
    parser.add_argument("task", metavar="TASK")
    parser.add_argument("new", metavar="NEW", help="its new name")


def _lineage(command: Callable[..., Any]) -> None:
    parser = command(
        "lineage",
        "where a task comes from: parents, experts, versions",
        """
        The task's parents and theirs, the experts that its gate can choose (its own, or shared and with whom), and the
        versions in which it changed. --plot draws it.
        """,
        "pathways lineage runs/demo spam --plot spam.svg",
    )
    _model(parser, at=True)
    parser.add_argument("task", metavar="TASK")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="text by default")
    parser.add_argument("--plot", metavar="FILE", help="draw it to an SVG, PNG or PDF file instead")


def _who_uses(command: Callable[..., Any]) -> None:
    parser = command(
        "who-uses",
        "the tasks that can choose an expert",
        "The tasks whose gate can choose an expert, and the share of their choices that it had when they came.",
        "pathways who-uses runs/demo layer1/mlp/5",
    )
    _model(parser, at=True)
    parser.add_argument("expert", nargs="+", metavar="EXPERT", help="layer1/mlp/5, or: 1 mlp 5")
    parser.add_argument("--format", choices=FORMATS, default="table", help="table by default")


def _diff(command: Callable[..., Any]) -> None:
    parser = command(
        "diff",
        "what is different between two versions",
        "Tasks, experts and components that were added, removed or changed from version A to B, and metrics of cards.",
        "pathways diff runs/demo 2 5 --task spam",
    )
    _model(parser)
    parser.add_argument("a", type=version, metavar="A", help="a version's number or name")
    parser.add_argument("b", type=version, metavar="B", help="another")
    parser.add_argument("--task", metavar="TASK", help="only what this task runs on")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="text by default")


def _pin(command: Callable[..., Any]) -> None:
    parser = command(
        "pin",
        "give a version a name, and keep it",
        """
        Names a version. --at takes the name wherever it takes a number, `pathways log` shows it, and
        `pathways compact` keeps the version.
        """,
        "pathways pin runs/demo paper --at 5",
    )
    _model(parser, at=True)
    parser.add_argument("name", metavar="NAME", help="letters, digits, '_', '-' and '.'")
    parser.add_argument("--remove", action="store_true", help="take the name away; the version stays")


def _collect(command: Callable[..., Any]) -> None:
    parser = command(
        "collect",
        "free the experts and components that no task needs",
        """
        Counts who needs what, and makes a version without experts that no gate can choose and components whose task is
        gone. Older versions keep theirs; `pathways compact` then gives the space back.
        """,
        "pathways collect runs/demo --dry-run",
    )
    _model(parser)
    parser.add_argument("--dry-run", action="store_true", help="only say what would go")
