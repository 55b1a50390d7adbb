"""What the trainer hands over, and its shape as tables.

Axis letters: N tasks, E experts of a layer (all kinds, in one order).

A *record* is what was counted since the record before it, up to and including `step`, in one phase.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import pyarrow as pa

Phase = Literal["train", "valid", "test", "predict"]
PHASES: tuple[str, ...] = get_args(Phase)

_name = pa.dictionary(pa.int32(), pa.string())
SCHEMAS: dict[str, pa.Schema] = {
    "routing": pa.schema(
        {
            "step": pa.int64(),
            "phase": _name,
            "task": _name,
            "layer": pa.int32(),
            "kind": _name,
            "expert": pa.int32(),
            "rows": pa.int64(),
            "weight": pa.float32(),
        }
    ),
    "pairs": pa.schema(
        {
            "step": pa.int64(),
            "phase": _name,
            "layer": pa.int32(),
            "kind_a": _name,
            "expert_a": pa.int32(),
            "kind_b": _name,
            "expert_b": pa.int32(),
            "rows": pa.int64(),
        }
    ),
    "entropy": pa.schema(
        {
            "step": pa.int64(),
            "phase": _name,
            "task": _name,
            "layer": pa.int32(),
            "rows": pa.int64(),
            "entropy": pa.float32(),
            "drops": pa.int64(),
        }
    ),
}
"""The stored tables. Every column is explained in docs/statistics.md."""


@dataclass(frozen=True, order=True)
class ExpertName:
    """An expert's place within its layer: its kind (the bank) and its index in that bank."""

    kind: str
    index: int


@dataclass(frozen=True, eq=False)
class LayerCounts:
    """The counters of one routed layer.

    Attributes:
        layer: the layer's number.
        experts: names of the E experts that the columns mean.
        rows: `[N, E]` rows that each task sent to each expert; a row with K choices counts at K experts.
        weight: `[N, E]` sum of the gate weights of those rows.
        drops: `[N]` choices dropped for lack of capacity.
        pairs: `[E, E]` rows that chose both experts; only the part above the diagonal is read.
        entropy_sum: `[N]` sum over rows of the entropy of the gate's distribution, in nats.
        routed_rows: `[N]` rows that were routed, each counted once.
    """

    layer: int
    experts: list[ExpertName]
    rows: np.ndarray
    weight: np.ndarray
    drops: np.ndarray
    pairs: np.ndarray
    entropy_sum: np.ndarray
    routed_rows: np.ndarray


@dataclass(frozen=True, eq=False)
class RoutingCounts:
    """One record: the counters of all routed layers.

    Attributes:
        step: the model's step at the end of the record.
        phase: what the rows were for.
        tasks: names of the N tasks that the rows of the counters mean.
        layers: one entry per routed layer.

    Raises:
        ValueError: an unknown phase, or a counter whose shape does not fit the tasks and experts.
    """

    step: int
    phase: Phase
    tasks: list[str]
    layers: list[LayerCounts]

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise ValueError(f"unknown phase: expected one of {', '.join(PHASES)}, got {self.phase!r}")
        n = len(self.tasks)
        for counts in self.layers:
            e = len(counts.experts)
            shapes = {"rows": (n, e), "weight": (n, e), "pairs": (e, e)}
            shapes |= dict.fromkeys(("drops", "entropy_sum", "routed_rows"), (n,))
            for field, shape in shapes.items():
                got = np.shape(getattr(counts, field))
                if got != shape:
                    raise ValueError(f"counter {field} of layer {counts.layer}: expected shape {shape}, got {got}")


def merge(parts: Sequence[RoutingCounts]) -> RoutingCounts:
    """One record of several about other tasks each, of one step and phase: their tasks and experts side by side.

    Raises:
        ValueError: a task is in two of them.
    """
    tasks = [task for part in parts for task in part.tasks]
    if len(set(tasks)) < len(tasks):
        raise ValueError(f"records to merge: expected other tasks in each, got {', '.join(tasks)}")
    numbers = sorted({layer.layer for part in parts for layer in part.layers})
    return RoutingCounts(parts[0].step, parts[0].phase, tasks, [_merge_layer(parts, number) for number in numbers])


def _merge_layer(parts: Sequence[RoutingCounts], number: int) -> LayerCounts:
    found = [(part, layer) for part in parts for layer in part.layers if layer.layer == number]
    experts = list(dict.fromkeys(expert for _, layer in found for expert in layer.experts))
    n, e = sum(len(part.tasks) for part in parts), len(experts)
    rows, pairs = np.zeros((n, e), np.int64), np.zeros((e, e), np.int64)
    weight, entropy = np.zeros((n, e)), np.zeros(n)
    drops, routed = np.zeros((2, n), np.int64)
    first = 0
    for part, layer in found:
        mine = slice(first, first + len(part.tasks))
        place = np.array([experts.index(expert) for expert in layer.experts], np.int64)
        rows[mine, place], weight[mine, place] = layer.rows, layer.weight
        drops[mine], entropy[mine], routed[mine] = layer.drops, layer.entropy_sum, layer.routed_rows
        # Only what is above the diagonal is read. The experts' order may be another here: so both halves are filled.
        half = np.triu(layer.pairs, k=1)
        pairs[np.ix_(place, place)] += half + half.T
        first += len(part.tasks)
    return LayerCounts(number, experts, rows, weight, drops, pairs, entropy, routed)


def record(counts: RoutingCounts) -> dict[str, pa.Table]:
    """The record as the three tables of `SCHEMAS`; entries that are zero are left out."""
    parts: dict[str, list[pa.Table]] = {name: [] for name in SCHEMAS}
    for layer in counts.layers:
        parts["routing"].append(_routing(counts, layer))
        parts["pairs"].append(_pairs(counts, layer))
        parts["entropy"].append(_entropy(counts, layer))
    return {name: join(name, tables) for name, tables in parts.items()}


def join(name: str, tables: list[pa.Table]) -> pa.Table:
    """One table of the schema `name` from many, with one dictionary for each column of names."""
    if not tables:
        return SCHEMAS[name].empty_table()
    return pa.concat_tables(tables).unify_dictionaries().combine_chunks()


def _routing(counts: RoutingCounts, layer: LayerCounts) -> pa.Table:
    task, expert = np.nonzero((layer.rows != 0) | (layer.weight != 0))
    kinds, kind_of = _kinds(layer)
    return _table(
        "routing",
        len(task),
        step=counts.step,
        phase=([counts.phase], 0),
        task=(counts.tasks, task),
        layer=layer.layer,
        kind=(kinds, kind_of[expert]),
        expert=_indices(layer)[expert],
        rows=layer.rows[task, expert],
        weight=layer.weight[task, expert],
    )


def _pairs(counts: RoutingCounts, layer: LayerCounts) -> pa.Table:
    a, b = np.nonzero(np.triu(layer.pairs, k=1))
    kinds, kind_of = _kinds(layer)
    index = _indices(layer)
    return _table(
        "pairs",
        len(a),
        step=counts.step,
        phase=([counts.phase], 0),
        layer=layer.layer,
        kind_a=(kinds, kind_of[a]),
        expert_a=index[a],
        kind_b=(kinds, kind_of[b]),
        expert_b=index[b],
        rows=layer.pairs[a, b],
    )


def _entropy(counts: RoutingCounts, layer: LayerCounts) -> pa.Table:
    (task,) = np.nonzero((layer.routed_rows != 0) | (layer.drops != 0))
    rows = layer.routed_rows[task]
    return _table(
        "entropy",
        len(task),
        step=counts.step,
        phase=([counts.phase], 0),
        task=(counts.tasks, task),
        layer=layer.layer,
        rows=rows,
        entropy=layer.entropy_sum[task] / np.maximum(rows, 1),
        drops=layer.drops[task],
    )


def _kinds(layer: LayerCounts) -> tuple[list[str], np.ndarray]:
    """The layer's kinds, and for each of the E experts the position of its kind in them."""
    kinds = list(dict.fromkeys(expert.kind for expert in layer.experts))
    return kinds, np.array([kinds.index(expert.kind) for expert in layer.experts], np.int32)


def _indices(layer: LayerCounts) -> np.ndarray:
    return np.array([expert.index for expert in layer.experts], np.int32)


def _table(name: str, length: int, **columns) -> pa.Table:
    """Builds the table `name`; a column is a number for all rows, an array, or `(names, positions in names)`."""
    arrays = []
    for field in SCHEMAS[name]:
        value = columns[field.name]
        if pa.types.is_dictionary(field.type):
            names, codes = value
            codes = pa.array(np.broadcast_to(np.asarray(codes, np.int32), (length,)))
            arrays.append(pa.DictionaryArray.from_arrays(codes, pa.array(names, pa.string())))
        else:
            dtype = field.type.to_pandas_dtype()
            arrays.append(pa.array(np.broadcast_to(np.asarray(value).astype(dtype), (length,)), field.type))
    return pa.Table.from_arrays(arrays, schema=SCHEMAS[name])
