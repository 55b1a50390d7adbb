"""From the stored rows to one dense matrix per layer, and from those to the derived tables.

Axis letters: N tasks, E experts of one layer.

Each task counts with its latest records: after a joint run that is the last record for all of them, and a task that
was trained alone later does not wipe out what the others use.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pathways.statistics.counts import ExpertName
from pathways.statistics.flags import PRESENT, coefficient_of_variation, cosine, flag, max_over_mean, shares


@dataclass(frozen=True, eq=False)
class LayerUsage:
    """Who used what in one layer.

    Attributes:
        rows, weight: `[N, E]` rows and summed gate weight of each task at each expert.
        routed, entropy, drops: `[N]` rows routed, mean entropy in nats, dropped choices.
    """

    layer: int
    experts: list[ExpertName]
    rows: np.ndarray
    weight: np.ndarray
    routed: np.ndarray
    entropy: np.ndarray
    drops: np.ndarray


def column(table: pa.Table, name: str) -> np.ndarray:
    return table[name].to_numpy()


def codes(table: pa.Table, name: str, names: list[str]) -> np.ndarray:
    """The positions of a column's values in `names`, -1 for one that is not there."""
    found = pc.index_in(table[name].cast(pa.string()), value_set=pa.array(names, pa.string()))
    return pc.fill_null(found, -1).to_numpy()


def latest_records(routing: pa.Table, entropy: pa.Table, tasks: list[str], window: int) -> tuple[pa.Table, pa.Table]:
    """The rows of both tables that belong to the last `window` records of each of the tasks."""
    task, step = codes(entropy, "task", tasks), column(entropy, "step")
    seen = np.unique(np.stack([task, step], axis=1)[task >= 0], axis=0)
    first = np.full(len(tasks) + 1, np.iinfo(np.int64).max)
    bounds = np.searchsorted(seen[:, 0], np.arange(len(tasks) + 1))
    for i, (begin, end) in enumerate(pairwise(bounds)):
        if begin < end:
            first[i] = seen[max(begin, end - window), 1]
    kept = [table.filter(column(table, "step") >= first[codes(table, "task", tasks)]) for table in (routing, entropy)]
    return kept[0], kept[1]


def layer_usages(
    routing: pa.Table, entropy: pa.Table, tasks: list[str], experts: dict[int, list[ExpertName]]
) -> dict[int, LayerUsage]:
    """Sums the rows into one `LayerUsage` per layer of `experts`; rows of unknown tasks or experts are left out."""
    usages = {}
    for layer, names in sorted(experts.items()):
        part = routing.filter(pc.equal(routing["layer"], layer))
        kinds = sorted({name.kind for name in names})
        place = np.full((len(kinds) + 1, max((name.index for name in names), default=0) + 2), -1)
        for i, name in enumerate(names):
            place[kinds.index(name.kind), name.index] = i
        index = np.minimum(column(part, "expert"), place.shape[1] - 1)
        n, e = codes(part, "task", tasks), place[codes(part, "kind", kinds), index]
        known = (n >= 0) & (e >= 0)
        rows, weight = np.zeros((2, len(tasks), len(names)))
        np.add.at(rows, (n[known], e[known]), column(part, "rows")[known])
        np.add.at(weight, (n[known], e[known]), column(part, "weight")[known])
        usages[layer] = LayerUsage(layer, names, rows, weight, *_entropies(entropy, layer, tasks))
    return usages


def _entropies(entropy: pa.Table, layer: int, tasks: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    part = entropy.filter(pc.equal(entropy["layer"], layer))
    n = codes(part, "task", tasks)
    part, n = part.filter(n >= 0), n[n >= 0]
    routed, total, drops = np.zeros((3, len(tasks)))
    np.add.at(routed, n, column(part, "rows"))
    np.add.at(total, n, column(part, "rows") * column(part, "entropy").astype(np.float64))
    np.add.at(drops, n, column(part, "drops"))
    return routed, total / np.maximum(routed, 1), drops


def similarity(usages: list[LayerUsage]) -> np.ndarray:
    """`[N, N]` cosines of the tasks' shares of experts, the layers side by side."""
    return cosine(np.concatenate([shares(usage.rows) for usage in usages], axis=1))


def expert_table(usages: dict[int, LayerUsage], tasks: list[str], phase: str) -> pa.Table:
    """One row per expert, also for experts that no row reached."""
    rows: list[dict] = []
    for usage in usages.values():
        load, flags = usage.rows.sum(axis=0), flag(usage.rows)
        share, by_task = shares(load), shares(usage.rows, axis=0)
        for e, (name, words) in enumerate(zip(usage.experts, flags.words(), strict=True)):
            top = int(by_task[:, e].argmax()) if load[e] else None
            rows.append(
                {
                    "phase": phase,
                    "layer": usage.layer,
                    "kind": name.kind,
                    "expert": name.index,
                    "rows": int(load[e]),
                    "share": float(share[e]),
                    "weight": float(usage.weight[:, e].sum()),
                    "tasks": int((by_task[:, e] > PRESENT).sum()),
                    "top_task": None if top is None else tasks[top],
                    "top_share": None if top is None else float(by_task[top, e]),
                    "dead": bool(flags.dead[e]),
                    "overloaded": bool(flags.overloaded[e]),
                    "exclusive": bool(flags.exclusive[e]),
                    "flags": words,
                }
            )
    return pa.Table.from_pylist(rows, schema=_EXPERTS)


def layer_table(usages: dict[int, LayerUsage], phase: str) -> pa.Table:
    """One row per layer: balance, entropy, number of experts with each flag."""
    rows: list[dict] = []
    for usage in usages.values():
        load, flags = usage.rows.sum(axis=0), flag(usage.rows)
        routed = usage.routed.sum()
        rows.append(
            {
                "phase": phase,
                "layer": usage.layer,
                "experts": len(usage.experts),
                "rows": int(load.sum()),
                "routed_rows": int(routed),
                "max_over_mean_load": max_over_mean(load),
                "cv_load": coefficient_of_variation(load),
                "cv_importance": coefficient_of_variation(usage.weight.sum(axis=0)),
                "entropy": float((usage.entropy * usage.routed).sum() / max(routed, 1)),
                "drops": int(usage.drops.sum()),
                "dead": int(flags.dead.sum()),
                "overloaded": int(flags.overloaded.sum()),
                "exclusive": int(flags.exclusive.sum()),
            }
        )
    return pa.Table.from_pylist(rows, schema=_LAYERS)


def task_table(usages: dict[int, LayerUsage], tasks: list[str], phase: str) -> pa.Table:
    """One row per task: what it uses, and the task nearest to it."""
    rows: list[dict] = []
    layers = list(usages.values())
    near = similarity(layers) if layers else np.eye(len(tasks))
    np.fill_diagonal(near, -1.0)
    owned = np.zeros(len(tasks), np.int64)
    for usage in layers:
        np.add.at(owned, usage.rows.argmax(axis=0)[flag(usage.rows).exclusive], 1)
    for n, task in enumerate(tasks):
        routed = sum(float(usage.routed[n]) for usage in layers)
        entropy = sum(float(usage.entropy[n] * usage.routed[n]) for usage in layers)
        nearest = int(near[n].argmax()) if len(tasks) > 1 else None
        rows.append(
            {
                "phase": phase,
                "task": task,
                "rows": int(max((usage.routed[n] for usage in layers), default=0)),
                "experts": sum(int((shares(usage.rows[n]) > PRESENT).sum()) for usage in layers),
                "exclusive": int(owned[n]),
                "entropy": entropy / max(routed, 1),
                "drops": int(sum(usage.drops[n] for usage in layers)),
                "nearest_task": None if nearest is None else tasks[nearest],
                "similarity": None if nearest is None else float(near[n, nearest]),
            }
        )
    return pa.Table.from_pylist(rows, schema=_TASKS)


_EXPERTS = pa.schema(
    {
        "phase": pa.string(),
        "layer": pa.int32(),
        "kind": pa.string(),
        "expert": pa.int32(),
        "rows": pa.int64(),
        "share": pa.float64(),
        "weight": pa.float64(),
        "tasks": pa.int32(),
        "top_task": pa.string(),
        "top_share": pa.float64(),
        "dead": pa.bool_(),
        "overloaded": pa.bool_(),
        "exclusive": pa.bool_(),
        "flags": pa.string(),
    }
)
_LAYERS = pa.schema(
    {
        "phase": pa.string(),
        "layer": pa.int32(),
        "experts": pa.int32(),
        "rows": pa.int64(),
        "routed_rows": pa.int64(),
        "max_over_mean_load": pa.float64(),
        "cv_load": pa.float64(),
        "cv_importance": pa.float64(),
        "entropy": pa.float64(),
        "drops": pa.int64(),
        "dead": pa.int32(),
        "overloaded": pa.int32(),
        "exclusive": pa.int32(),
    }
)
_TASKS = pa.schema(
    {
        "phase": pa.string(),
        "task": pa.string(),
        "rows": pa.int64(),
        "experts": pa.int32(),
        "exclusive": pa.int32(),
        "entropy": pa.float64(),
        "drops": pa.int64(),
        "nearest_task": pa.string(),
        "similarity": pa.float64(),
    }
)
