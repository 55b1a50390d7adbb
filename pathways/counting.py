"""From a sub-model's routing counters to records of the model's statistics.

Axis letters: N tasks of the sub-model, E slots of its bank in one layer.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from pathways.model import STATISTICS, Model, beside
from pathways.statistics.counts import ExpertName, LayerCounts, Phase, RoutingCounts
from pathways.statistics.files import Files, open_files
from pathways.statistics.parts import list_parts, read_part
from pathways.statistics.reader import Statistics
from pathways.submodel import SubModel
from routing.counters import Counters
from tasks.errors import UserError


def to_counts(sub: SubModel, counters: Sequence[Counters], step: int, phase: Phase) -> RoutingCounts:
    """One record: the sub-model's slots become the experts of the model's banks that stand in them.

    Args:
        counters: one per routed layer, of numpy arrays (`jax.device_get`); `rows` and `weight` `[N, E]`.
        step: of the model.
    """
    numbers = sub.config.model.routed_layers
    layers = [
        LayerCounts(
            layer=number,
            experts=[ExpertName(kind, int(i)) for kind, index in experts.items() for i in index],
            rows=_whole(found.rows),
            weight=np.asarray(found.weight, np.float64),
            drops=_whole(found.drops),
            pairs=_whole(found.pairs),
            entropy_sum=np.asarray(found.entropy_sum, np.float64),
            routed_rows=_whole(found.routed_rows),
        )
        for number, experts, found in zip(numbers, sub.layout.experts, counters, strict=True)
    ]
    return RoutingCounts(step, phase, list(sub.names), layers)


def free_step(location: str | Path | Files, phase: Phase, tasks: Sequence[str], start: int) -> int:
    """The step for an evaluation's record, so that no other task's latest record is lost.

    The newest record of the phase is replaced if it is about these tasks only; else the new one comes after it.

    Args:
        start: the step where there is no record of any phase.
    """
    files = open_files(location)
    parts, _ = list_parts(files, "entropy")
    mine = [part for part in parts if part.phase == phase]
    if not mine:
        return max((part.last for part in parts), default=start)
    newest = max(mine, key=lambda part: part.last)
    table = read_part(files, newest)
    names = pc.unique(table.filter(pc.equal(table["step"], newest.last))["task"]).to_pylist()
    return newest.last if set(names) <= set(tasks) else newest.last + 1


def open_statistics(model: Model | str | os.PathLike[str], phase: str | None = None) -> Statistics:
    """The statistics of a model, or of the folder of one, derived for the tasks and experts that it has now.

    A folder without a model, as while one is trained, gives those of all that was recorded.

    Raises:
        UserError: none were recorded, or none of the phase.
    """
    if not isinstance(model, Model):
        location = beside(model, STATISTICS)
        try:
            model = Model.open(model)
        except UserError:
            return Statistics.open(location, phase=phase)
    location = beside(model.path, STATISTICS)
    if not model.view.has("manifest"):
        return Statistics.open(location, phase=phase)
    return Statistics.open(location, phase=phase, tasks=sorted(model.tasks), experts=expert_names(model))


def expert_names(model: Model) -> dict[int, list[ExpertName]]:
    """Layer -> the experts of its banks, without the free places of removed ones."""
    free = model.manifest.get("free") or [{} for _ in model.bank_sizes]
    return {
        layer: [ExpertName(kind, i) for kind, n in banks.items() for i in range(n) if i not in gone.get(kind, ())]
        for layer, banks, gone in zip(model.routed_layers, model.bank_sizes, free, strict=True)
    }


def _whole(values: Any) -> np.ndarray:
    return np.rint(np.asarray(values)).astype(np.int64)
