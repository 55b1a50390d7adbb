"""Showing evaluations: tables on a terminal, tidy CSV, whole JSON, confusion pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pathways import report
from pathways.cli.commands import print_json

if TYPE_CHECKING:
    from pathways.evaluation import Evaluation

MOST_CLASSES = 20
"""Classes listed per task on a terminal, those with the lowest F1; csv of one task and json have all."""


def show(found: Sequence[Evaluation], format: str, *, details: bool, worst: int) -> None:
    """Prints evaluations in one of the three formats."""
    if format == "json":
        print_json([one.to_json() for one in found])
    elif format == "csv":
        names = ("task", "split", "examples", "metric", "value")
        rows = [
            [one.task, one.split, one.examples, name, value] for one in found for name, value in one.metrics.items()
        ]
        report.table("", names, rows, format="csv")
    else:
        _summary(found)
        for one in found:
            if details:
                _details(one)
            if worst:
                _worst(one)


def _summary(found: Sequence[Evaluation]) -> None:
    columns = [
        report.Column("task", "word"),
        report.Column("examples", "integer"),
        report.Column("metric", "word"),
        report.Column("value", "number"),
        report.Column("others"),
        report.Column("unseen", "integer"),
    ]
    rows = []
    for one in found:
        name, value = one.chief
        others = ", ".join(f"{key} {report.number(v)}" for key, v in one.metrics.items() if key != name and v == v)
        rows.append([one.task, one.examples, name, None if math.isnan(value) else value, others, one.counts["unseen"]])
    split = found[0].split if found else ""
    report.table(f"{len(found)} task{'s' * (len(found) != 1)}, {split} split", columns, rows)
    for one in found:
        for name, reason in one.reasons.items():
            print(f"{one.task}: no {name}, {reason}")
        if one.unseen:
            labels = ", ".join(list(one.unseen)[:5])
            print(f"{one.task}: {sum(one.unseen.values())} labels unseen in training count as wrong: {labels}")
        left = {"bad": "did not decode", "bad_target": "have an unusable target", "missing_target": "have no target"}
        for key, text in left.items():
            if one.counts.get(key):
                print(f"{one.task}: {one.counts[key]} rows {text} and are left out")


def _details(one: Evaluation) -> None:
    classes = sorted(one.per_class, key=lambda row: row["f1"])[:MOST_CLASSES]
    if len(one.per_class) <= MOST_CLASSES:
        classes = one.per_class
    if classes:
        more = f", the {MOST_CLASSES} with the lowest F1 of {len(one.per_class)}"
        _rows(f"{one.task}: per class{more if len(classes) < len(one.per_class) else ''}", classes)
    if one.per_group:
        _rows(f"{one.task}: per group", one.per_group)


def _rows(title: str, rows: list[dict[str, Any]]) -> None:
    kinds: dict[str, report.Kind] = {"support": "integer", "examples": "integer", "class": "text", "group": "text"}
    columns = [report.Column(name, kinds.get(name, "number")) for name in rows[0]]
    report.table(title, columns, [list(row.values()) for row in rows])


def _worst(one: Evaluation) -> None:
    if not one.worst:
        return
    columns = [
        report.Column("row", "integer"),
        report.Column("loss", "number"),
        report.Column("truth"),
        report.Column("prediction"),
        report.Column("confidence", "percent"),
        report.Column("inputs"),
    ]
    rows = [[m.row, m.loss, m.truth, m.prediction, m.confidence, m.inputs] for m in one.worst]
    report.table(f"{one.task}: the {len(rows)} worst", columns, rows)


def draw(found: Sequence[Evaluation], folder: Path) -> list[Path]:
    """A confusion picture of each task with classes, `<task>.confusion.png`."""
    from pathways import plots

    paths = []
    for one in found:
        if one.confusion is not None:
            figure = plots.confusion(one.confusion[:, :-1], one.classes)
            paths.append(plots.save(figure, folder / f"{one.task.replace('/', '.')}.confusion.png"))
    return paths
