"""Closing what a task leaves open by looking at its file, and saying what was chosen and why.

Kinds of inputs are judged on the first rows of the training split; the kind of the target on all of them, streaming,
because one odd value far down decides between classes and numbers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import pyarrow as pa

from tasks.check import check_task, listing, unknown
from tasks.errors import UserError
from tasks.readers.image_folder import SUFFIXES as IMAGE_SUFFIXES
from tasks.spec import LOSSES, METRICS, Input, InputKind, Target, TargetKind, Task
from tasks.splits import ROW, open_split, rows
from tasks.values import (
    MISSING_MARKERS,
    is_list,
    is_missing,
    is_numeric,
    label_column,
    natural_order,
    parse_number,
    spells_number,
    target_numbers,
    text_column,
)

__all__ = ["MISSING_MARKERS", "infer", "is_missing", "parse_number"]

SAMPLE = 2000
"""Rows looked at for the kinds of the inputs."""

MAX_NUMBER_CLASSES = 20
"""Whole numbers with more distinct values than this are a regression target."""

_IMAGE_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"RIFF", b"II*\x00", b"MM\x00*")
_ID_NAME = re.compile(r"(?i:(?:^|[\s_\-.])(?:id|idx|index|uuid|guid|key|rowid)$)|[a-z]I[Dd]$|[A-Z]ID$")
_ID_VALUE = re.compile(r"[A-Za-z]{0,16}[-_:#.]?\d+|[0-9a-fA-F]{8,}(-[0-9a-fA-F]{4,})*")


@dataclass(frozen=True)
class _Column:
    """What the sample shows of one column. `texts` has no missing value; binary columns have `head` instead."""

    name: str
    rows: int
    texts: list[str]
    numeric: bool
    lists: bool
    head: bytes | None = None
    shape: bool = False


def infer(task: Task) -> tuple[Task, list[str]]:
    """Closes every open kind of a task.

    Returns:
        The task with inputs, kinds, loss and metrics filled in, and lines that tell what was chosen and why. With
        `each` set, the whole file is judged and `each` is kept: infer first, then `tasks.registry.expand`.

    Raises:
        UserError: a column that is not there, a target that is missing throughout, or one that cannot be judged.
    """
    check_task(task)
    reader = open_split(task, "train")
    check_columns(task, reader.columns)
    sample = _sample(task)
    target, aligned, why = _target(task, sample, reader.format)
    inputs, lines = _inputs(task, sample, target, aligned)
    kind = target.kind
    assert kind is not None
    closed = replace(
        task,
        target=target,
        inputs=inputs,
        loss=task.loss or LOSSES[kind][0],
        metrics=task.metrics or METRICS[kind],
    )
    check_task(closed)
    return closed, [*lines, f"target: {listing(target.columns, 6)} {kind}, {why}"]


def check_columns(task: Task, columns: tuple[str, ...]) -> None:
    """Raises UserError for the first column that the task names and the file does not have."""
    extra = [name for name in (task.each, task.group, task.where[0] if task.where else None) if name is not None]
    for name in [*task.target.columns, *(column.column for column in task.inputs), *task.ignore, *extra]:
        if name not in columns:
            raise unknown("column", name, columns, where=f"task {task.name}, {task.train}")


def _sample(task: Task) -> dict[str, _Column]:
    taken = 0
    batches: list[pa.RecordBatch] = []
    for batch in rows(task, "train", rows_per_batch=SAMPLE):
        batches.append(batch.slice(0, SAMPLE - taken))
        taken += batches[-1].num_rows
        if taken >= SAMPLE:
            break
    if not batches:
        where = f" in which {task.where[0]} is {task.where[1]!r}" if task.where else ""
        raise UserError(f"there are no training rows{where}", where=f"task {task.name}, {task.train}")
    names = [name for name in batches[0].schema.names if name != ROW]
    return {name: _column(name, [batch.column(name) for batch in batches], batches[0].schema) for name in names}


def _column(name: str, arrays: list[pa.Array], schema: pa.Schema) -> _Column:
    n = sum(map(len, arrays))
    first = arrays[0]
    if pa.types.is_binary(first.type) or pa.types.is_large_binary(first.type):
        head = next((value[:16] for value in first.slice(0, 64).to_pylist() if value), b"")
        shape = b"shape" in (schema.field(name).metadata or {})
        return _Column(name, n, [], numeric=False, lists=False, head=head, shape=shape)
    texts = [text for array in arrays for text in label_column(array).to_pylist() if text is not None]
    numeric = all(is_numeric(array) or pa.types.is_null(array.type) for array in arrays) and bool(texts)
    return _Column(name, n, texts, numeric, lists=any(is_list(array) for array in arrays))


def _inputs(
    task: Task, sample: dict[str, _Column], target: Target, aligned: str | None
) -> tuple[tuple[Input, ...], list[str]]:
    """The inputs with kinds, and the lines about them."""
    chosen: list[Input] = []
    told: list[str] = []
    ignored: list[str] = []
    if task.inputs:
        for column in task.inputs:
            kind, why = (column.kind, "") if column.kind else _kind(sample[column.column])
            chosen.append(Input(column.column, kind))
            told.append(f"{column.column} {kind}{why}")
    else:
        lists = (name for name in _words_first(sample) if sample[name].lists and name not in target.columns)
        words = aligned or next(lists, None)
        apart = {*target.columns, *task.ignore, task.group, task.each, task.where[0] if task.where else None}
        for name, column in sample.items():
            if name in apart:
                continue
            reason = _useless(column, words, target.kind == "tagging")
            if reason:
                ignored.append(f"{name} ({reason})")
                continue
            kind, why = _kind(column)
            chosen.append(Input(name, kind))
            told.append(f"{name} {kind}{why}")
    if not chosen:
        raise UserError(
            "no column is left to be an input",
            where=f"task {task.name}, {task.train}",
            expected="at least one column besides the target that varies",
            got="ignored: " + listing(ignored) if ignored else "no other column",
            fix="name the columns to use with inputs",
        )
    lines = ["inputs: " + listing(told, 40)]
    if ignored:
        lines.append("ignored: " + listing(ignored, 40))
    # The words that the tags belong to are the first text input, see FittedTask.tokens_column.
    return tuple(sorted(chosen, key=lambda column: column.column != aligned)), lines


def _useless(column: _Column, words: str | None, tagging: bool) -> str | None:
    """Why a column should not be an input, None if it may be one."""
    if column.head is not None:
        return None
    if words is not None and column.name != words and (column.lists or tagging):
        return f"an annotation beside {words}; name it in inputs to use it"
    if not column.texts:
        return f"no value in the first {column.rows} rows"
    distinct = len(set(column.texts))
    if distinct == 1 and len(column.texts) == column.rows and column.rows > 1:
        return f"{column.texts[0][:30]!r} in each of the first {column.rows} rows"
    if column.rows >= 5 and distinct >= 0.98 * column.rows:
        named = _ID_NAME.search(column.name) is not None
        whole = column.numeric or all(parse_number(text) is not None for text in column.texts)
        looks = not whole and sum(_ID_VALUE.fullmatch(t) is not None for t in column.texts) >= 0.95 * len(column.texts)
        file = any(text.lower().endswith((*IMAGE_SUFFIXES, ".wav")) for text in column.texts[:20])
        if (named or looks) and not file:
            return "an identifier: every row has its own"
    return None


def _kind(column: _Column) -> tuple[InputKind, str]:
    """The kind of an input column and, in brackets, what speaks for it."""
    if column.head is not None:
        return _binary_kind(column)
    if column.lists:
        return "text", " (lists of words)"
    if not column.texts:
        raise UserError(f"column {column.name!r} has no value in the first {column.rows} rows", fix="say its kind")
    texts = column.texts
    lower = [text.lower() for text in texts]
    if all(text.endswith(IMAGE_SUFFIXES) for text in lower):
        return "image", " (file names)"
    if all(text.endswith(".wav") for text in lower):
        return "audio", " (file names)"
    numbers = sum(map(spells_number, texts))
    if column.numeric or numbers >= 0.98 * len(texts):
        odd = len(texts) - numbers
        return "number", f" ({odd} of {len(texts)} are not numbers and count as missing)" if odd else ""
    return _words_kind(texts)


def _words_kind(texts: list[str]) -> tuple[InputKind, str]:
    distinct = len(set(texts))
    words = sum(len(text.split()) for text in texts) / len(texts)
    length = sum(map(len, texts)) / len(texts)
    many = len(texts) >= 20 and distinct > 0.5 * len(texts)
    if words >= 4 or length >= 40 or many:
        return "text", f" (about {length:.0f} characters)"
    return "category", f" ({distinct} values)"


def _binary_kind(column: _Column) -> tuple[InputKind, str]:
    head = column.head or b""
    if column.shape:
        return "image", " (raw pixels)"
    if head.startswith(b"RIFF") and head[8:12] == b"WAVE":
        return "audio", " (WAV bytes)"
    if head.startswith(_IMAGE_MAGIC):
        return "image", " (encoded bytes)"
    raise UserError(
        f"column {column.name!r} holds bytes of an unknown kind",
        expected="an image file or a WAV file in each cell",
        got=f"bytes beginning {head[:8].hex(' ')}" if head else "no bytes",
        fix=f"ignore the column: ignore = [{column.name!r}]",
    )


def _target(task: Task, sample: dict[str, _Column], format: str) -> tuple[Target, str | None, str]:
    """The closed target, the list column its tags are aligned with (tagging only), and why."""
    columns, kind = task.target.columns, task.target.kind
    aligned = None
    why = "as said"
    first = sample[columns[0]]
    if len(columns) == 1 and first.lists and kind in (None, "tagging"):
        aligned = _aligned(task, sample)
        kind, why = ("tagging", f"one tag for each of {aligned}") if aligned else ("multilabel", "lists of labels")
    if kind == "tagging" and aligned is None:
        raise UserError(
            "no input column has one word for each tag",
            where=f"task {task.name}, {task.train}",
            expected=f"a list column as long, row by row, as {columns[0]!r}",
            got=f"list columns: {listing(name for name, c in sample.items() if c.lists) or 'none'}",
        )
    if kind is None and format in ("idx", "images"):
        kind, why = "classification", "the classes of the images"
    if kind is None:
        kind, why = _one_column(task, columns[0]) if len(columns) == 1 else _several_columns(task, columns)
    return Target(columns, kind), aligned, why


def _aligned(task: Task, sample: dict[str, _Column]) -> str | None:
    """The list column that has as many words as the target has tags in every sampled row; `tokens` if it is one."""
    names = [column.column for column in task.inputs] or _words_first(sample)
    candidates = [name for name in names if sample[name].lists and name not in task.target.columns]
    for batch in islice(rows(task, "train", columns=[*candidates, *task.target.columns], rows_per_batch=SAMPLE), 1):
        tags = _lengths(batch.column(task.target.columns[0]))
        candidates = [name for name in candidates if np.array_equal(_lengths(batch.column(name)), tags)]
    return candidates[0] if candidates else None


def _words_first(sample: dict[str, _Column]) -> list[str]:
    return sorted(sample, key=lambda name: name not in ("tokens", "words"))


def _lengths(array: pa.Array) -> np.ndarray:
    return np.array([0 if value is None else len(value) for value in array.to_pylist()])


def _one_column(task: Task, column: str) -> tuple[TargetKind, str]:
    values: Counter[str] = Counter()
    missing = 0
    for batch in rows(task, "train", columns=[column]):
        labels = label_column(batch.column(0))
        missing += labels.null_count
        counts = labels.value_counts()
        values.update({c["values"]: c["counts"] for c in counts.to_pylist() if c["values"] is not None})
        if len(values) > 50_000:
            break
    if not values:
        raise UserError(
            "the target has no value in any training row",
            where=f"task {task.name}, {task.train}, column {column}",
            expected="labels or numbers",
            got="only missing values",
        )
    none = f" ({missing} rows have none and are left out)" if missing else ""
    # Infinities pass as numbers here: the regression that they would spoil names their rows.
    if not all(map(spells_number, values)):
        return "classification", f"{len(values)} classes: {listing(natural_order(values), 5)}{none}"
    numbers = [parse_number(text) for text in values]
    whole = all(number is not None and number == int(number) for number in numbers)
    if len(values) <= 2 or (whole and len(values) <= MAX_NUMBER_CLASSES):
        return "classification", f"{len(values)} values: {listing(natural_order(values), 5)}{none}"
    told = f"{len(values)} distinct numbers" + ("" if whole else ", not all whole")
    return "regression", f"{told} (say kind = 'classification' if they are classes){none}"


def _several_columns(task: Task, columns: tuple[str, ...]) -> tuple[TargetKind, str]:
    binary, share, known = True, True, False
    for batch in _target_batches(task, columns):
        numbers = [target_numbers(batch.column(name)) for name in columns]
        for name, number in zip(columns, numbers, strict=True):
            texts = text_column(batch.column(name)).filter(pa.array(number.bad)).to_pylist()
            odd = next((text for text in texts if text and not spells_number(text)), None)
            if odd is not None:
                raise UserError(
                    f"target column {name!r} holds text, and there are several target columns",
                    where=f"task {task.name}, {task.train}",
                    expected="numbers: 0/1 for labels, shares for a distribution, values for regression",
                    got=repr(odd),
                    fix="say the target's kind if these values are meant",
                )
        table = np.stack([number.value for number in numbers], axis=1)
        known = known or bool(np.isfinite(table).any())
        binary = binary and bool(np.isin(table[np.isfinite(table)], (0.0, 1.0)).all())
        share = share and bool((table >= 0).all() and (np.abs(table.sum(1) - 1) < 1e-3).all())
    if not known:
        raise UserError("the targets have no value in any training row", where=f"task {task.name}, {task.train}")
    if share:
        return "distribution", f"{len(columns)} shares that sum to 1 in every row"
    if binary:
        return "multilabel", f"{len(columns)} columns of 0, 1 or blank"
    return "regression", f"{len(columns)} columns of numbers"


def _target_batches(task: Task, columns: tuple[str, ...]) -> Iterator[pa.RecordBatch]:
    return rows(task, "train", columns=columns, rows_per_batch=65536)
