"""Checks of names and specs that need no file, and the words of "did you mean"."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from tasks.errors import UserError
from tasks.spec import LOSSES, METRICS, Task

_NAME = re.compile(r"[\w.\-]+(/[\w.\-]+)*")


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The most similar of `names`, without regard to case; None when nothing is similar."""
    folded: dict[str, str] = {}
    for candidate in names:
        folded.setdefault(candidate.casefold(), candidate)
    close = difflib.get_close_matches(name.casefold(), list(folded), n=1, cutoff=0.6)
    return folded[close[0]] if close else None


def listing(names: Iterable[str], limit: int = 20) -> str:
    """The names with commas, the rest beyond `limit` as a count."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def unknown(what: str, name: str, names: Iterable[str], *, where: str | None = None) -> UserError:
    """The error for a name that is not among `names`: it lists them and suggests the nearest."""
    names = list(names)
    guess = nearest(name, names)
    return UserError(
        f"there is no {what} {name!r}",
        where=where,
        expected=f"one of: {listing(names)}" if names else f"no {what} is known here",
        got=repr(name),
        fix=f"did you mean {guess!r}?" if guess else None,
    )


def check_name(name: str) -> str:
    """Returns `name`; raises UserError unless it is made of letters, digits, `_`, `-`, `.` and single `/` between."""
    if not _NAME.fullmatch(name) or any(not part.strip(".") for part in name.split("/")):
        raise UserError(
            f"{name!r} is not a valid name",
            expected="letters, digits, '_', '-', '.', and '/' between parts",
            got=repr(name),
            fix=f"for example {slug(name)!r}",
        )
    return name


def slug(text: str) -> str:
    """`text` with every character that a name may not hold replaced by `_`; never empty."""
    text = re.sub(r"[^\w.\-]", "_", text.strip())
    return text if text.strip(".") else "_"


def check_task(task: Task) -> Task:
    """Returns `task`; raises UserError for whatever is wrong in it and can be seen without opening a file."""
    check_name(task.name)
    here = f"task {task.name}"
    if not task.target.columns:
        raise UserError("the task has no target", where=here, expected="the column or columns to predict")
    named = [*task.target.columns, *(column.column for column in task.inputs)]
    twice = sorted({column for column in named if named.count(column) > 1})
    if twice:
        raise UserError(f"column {twice[0]!r} is used twice", where=here, expected="each column once, input or target")
    _check_split(task, here)
    if not 0 < task.weight < float("inf"):
        raise UserError("the weight is not positive", where=here, expected="weight > 0", got=f"weight = {task.weight}")
    if task.max_rows is not None and task.max_rows < 1:
        raise UserError("max_rows leaves no row", where=here, expected="max_rows >= 1", got=f"{task.max_rows}")
    kind = task.target.kind
    if kind is not None:
        if kind not in LOSSES:
            raise unknown("target kind", kind, LOSSES, where=here)
        if kind in ("classification", "tagging") and len(task.target.columns) > 1:
            raise UserError(
                f"{kind} has one target column", where=here, expected="1 column", got=listing(task.target.columns)
            )
        if task.loss is not None and task.loss not in LOSSES[kind]:
            raise unknown(f"loss for {kind} named", task.loss, LOSSES[kind], where=here)
        for metric in task.metrics:
            if metric not in METRICS[kind]:
                raise unknown(f"metric for {kind} named", metric, METRICS[kind], where=here)
    return task


def _check_split(task: Task, here: str) -> None:
    split = task.split
    if not (0 <= split.valid < 1 and 0 <= split.test < 1 and split.valid + split.test < 1):
        raise UserError(
            "the split leaves no training rows",
            where=here,
            expected="valid and test in 0..1 with valid + test < 1",
            got=f"valid = {split.valid}, test = {split.test}",
        )
    for name in ("valid", "test"):
        if getattr(task, name) == task.train:
            raise UserError(
                f"the {name} file is the training file: its figures would mean nothing",
                where=here,
                got=task.train,
                fix=f"leave {name} out, and {getattr(split, name):.0%} of the rows are held back for it",
            )
