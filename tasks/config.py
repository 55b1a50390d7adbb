"""Tasks from a TOML file's `[[tasks]]` tables and from the flags of a command, strictly: an unknown key is an error.

[[tasks]]
name = "income"
train = "adult/train.csv"              # paths are relative to the config's folder
target = "income"                      # or ["a", "b"], or {columns = ["a", "b"], kind = "multilabel"}
inputs = ["age", {column = "sex", kind = "category"}]
where = {native_country = "Mexico"}
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import msgspec

from tasks.check import check_task, listing, nearest
from tasks.errors import UserError
from tasks.registry import Registry
from tasks.spec import Input, InputKind, OnBad, Split, Target, TargetKind, Task


class _InputTable(msgspec.Struct, forbid_unknown_fields=True):
    column: str
    kind: InputKind | None = None


class _TargetTable(msgspec.Struct, forbid_unknown_fields=True):
    columns: str | list[str]
    kind: TargetKind | None = None


class _SplitTable(msgspec.Struct, forbid_unknown_fields=True):
    valid: float = Split.valid
    test: float = Split.test
    seed: int = Split.seed


class _TaskTable(msgspec.Struct, forbid_unknown_fields=True):
    """The keys of a `[[tasks]]` table; their meaning is that of `tasks.spec.Task`."""

    name: str
    train: str
    target: str | list[str] | _TargetTable
    inputs: list[str | _InputTable] = []
    valid: str | None = None
    test: str | None = None
    split: _SplitTable = msgspec.field(default_factory=_SplitTable)
    ignore: list[str] = []
    each: str | None = None
    where: dict[str, str | int | bool] | None = None
    format: str | None = None
    loss: str | None = None
    metrics: list[str] = []
    weight: float = 1.0
    group: str | None = None
    on_bad: OnBad = "stop"
    max_rows: int | None = None
    encoding: str | None = None


def tasks_from_toml(tables: Sequence[Mapping[str, Any]], base: Path) -> list[Task]:
    """The tasks of a config.

    Args:
        tables: the `[[tasks]]` of a TOML file, loaded.
        base: the config's folder; relative paths are relative to it.

    Raises:
        UserError: an unknown key, a wrong type, a name that is taken; names the task and the key.
    """
    registry: Registry[Task] = Registry("task")
    for place, table in enumerate(tables, start=1):
        task = _task(table, f"[[tasks]] number {place}", base)
        registry.register(task.name, task)
    return list(registry)


def task_from_flags(
    name: str,
    data: str,
    target: str | Sequence[str],
    *,
    kind: str | None = None,
    inputs: Sequence[str] = (),
    where: str | None = None,
    base: Path | None = None,
    **keys: Any,
) -> Task:
    """A task from the flags of a command.

    Args:
        data: the training file.
        target: a column, or several.
        kind: the target's kind; inferred by default.
        inputs: columns, each maybe `column:kind`.
        where: `column=value`.
        base: what relative paths are relative to; the working directory by default.
        keys: any other key of a `[[tasks]]` table; None means: not given.
    """
    columns = [target] if isinstance(target, str) else list(target)
    table: dict[str, Any] = {key: value for key, value in keys.items() if value is not None}
    table |= {"name": name, "train": data, "inputs": [_input_flag(text) for text in inputs]}
    table["target"] = {"columns": columns} if kind is None else {"columns": columns, "kind": kind}
    if where is not None:
        column, equals, value = where.partition("=")
        if not equals:
            raise UserError("--where needs a column and a value", expected="--where COLUMN=VALUE", got=where)
        table["where"] = {column.strip(): value.strip()}
    return _task(table, f"task {name}", base or Path())


def _input_flag(text: str) -> dict[str, str]:
    column, colon, kind = text.rpartition(":")
    if colon and kind in get_args(InputKind):
        return {"column": column, "kind": kind}
    return {"column": text}


def _task(table: Mapping[str, Any], where: str, base: Path) -> Task:
    here = f"{where}, {table['name']!r}" if isinstance(table.get("name"), str) else where
    _check_keys(table, here, _TaskTable)
    for key, struct in (("target", _TargetTable), ("split", _SplitTable)):
        if isinstance(table.get(key), Mapping):
            _check_keys(table[key], f"{here}, {key}", struct)
    for column in table.get("inputs") or ():
        if isinstance(column, Mapping):
            _check_keys(column, f"{here}, inputs", _InputTable)
    try:
        parsed = msgspec.convert(dict(table), _TaskTable)
    except msgspec.ValidationError as error:
        problem, _, path = str(error).partition(" - at `$")
        raise UserError(
            "a value of the task is not of the right type",
            where=f"{here}, key {path.strip('.`')}" if path else here,
            got=problem,
        ) from error
    return check_task(_build(parsed, here, base))


def _check_keys(table: Mapping[str, Any], where: str, struct: type[msgspec.Struct]) -> None:
    known = struct.__struct_fields__
    for key in table:
        if key not in known:
            guess = nearest(key, known)
            raise UserError(
                f"there is no key {key!r}",
                where=where,
                expected=f"one of: {listing(known, 30)}",
                got=repr(key),
                fix=f"did you mean {guess!r}?" if guess else None,
            )
    required = [f.name for f in msgspec.structs.fields(struct) if f.required and f.name not in table]
    if required:
        raise UserError(f"the key {required[0]!r} is missing", where=where, got=f"keys: {listing(table) or 'none'}")


def _build(table: _TaskTable, here: str, base: Path) -> Task:
    if table.where is not None and len(table.where) != 1:
        raise UserError(
            "where names one column",
            where=here,
            expected="where = {column = value}",
            got=f"{len(table.where)} columns: {listing(table.where)}",
        )
    return Task(
        name=table.name,
        train=_path(base, table.train),
        valid=_path(base, table.valid) if table.valid is not None else None,
        test=_path(base, table.test) if table.test is not None else None,
        target=_target(table.target),
        inputs=tuple(Input(c) if isinstance(c, str) else Input(c.column, c.kind) for c in table.inputs),
        split=Split(table.split.valid, table.split.test, table.split.seed),
        ignore=tuple(table.ignore),
        each=table.each,
        where=next(((column, _text(value)) for column, value in table.where.items()), None) if table.where else None,
        format=table.format,
        loss=table.loss,
        metrics=tuple(table.metrics),
        weight=table.weight,
        group=table.group,
        on_bad=table.on_bad,
        max_rows=table.max_rows,
        encoding=table.encoding,
    )


def _target(target: str | Iterable[str] | _TargetTable) -> Target:
    if isinstance(target, _TargetTable):
        return Target((target.columns,) if isinstance(target.columns, str) else tuple(target.columns), target.kind)
    return Target((target,) if isinstance(target, str) else tuple(target))


def _text(value: str | int | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _path(base: Path, path: str) -> str:
    # Absolute, so that a model still finds its data when asked from another folder.
    return os.path.normpath((base / Path(path).expanduser()).absolute())
