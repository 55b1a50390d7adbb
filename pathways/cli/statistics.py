"""Showing routing statistics: tables and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pathways import plots, report

if TYPE_CHECKING:
    import pyarrow as pa

    from pathways.statistics.reader import Statistics

KINDS: dict[str, report.Kind] = {
    "share": "percent",
    "top_share": "percent",
    "task_share": "percent",
    "expert_share": "percent",
}
SHOWN = {
    "layers": ("layer", "experts", "rows", "max_over_mean_load", "entropy", "dead", "overloaded", "exclusive"),
    "tasks": ("task", "rows", "experts", "exclusive", "entropy", "nearest_task", "similarity"),
    "experts": ("layer", "kind", "expert", "rows", "share", "tasks", "top_task", "top_share", "flags"),
}
"""Columns of the derived tables that a terminal shows; csv and json have all."""

SHORT = {"max_over_mean_load": "max/mean", "overloaded": "overload", "exclusive": "exclus."}


def show(statistics: Statistics, name: str | None, format: str) -> None:
    """Prints one table; by default the three derived ones on a terminal, and `usage` as csv or json."""
    if name is None and format != "table":
        name = "usage"
    for one in SHOWN if name is None else (name,):
        table = usage(statistics) if one == "usage" else statistics.tables[one]
        if format == "table" and one in SHOWN:
            table = table.select(list(SHOWN[one])).rename_columns([SHORT.get(n, n) for n in SHOWN[one]])
        title = f"{one}, {statistics.phase}" if one in (*SHOWN, "usage") else one
        report.arrow_table(title, table, KINDS, format=format)


def usage(statistics: Statistics) -> pa.Table:
    """One row per task, layer and expert that has rows: `task_share` of the task's choices in the layer,
    `expert_share` of the expert's rows."""
    import pyarrow as pa

    rows = []
    for layer in statistics.usage.values():
        by_task, by_expert = layer.rows.sum(axis=1), layer.rows.sum(axis=0)
        for n, task in enumerate(statistics.task_names):
            for e, expert in enumerate(layer.experts):
                count = int(layer.rows[n, e])
                if count:
                    place = {"task": task, "layer": layer.layer, "kind": expert.kind, "expert": expert.index}
                    shares = {"task_share": count / by_task[n], "expert_share": count / by_expert[e]}
                    rows.append({**place, "rows": count, "weight": float(layer.weight[n, e]), **shares})
    return pa.Table.from_pylist(sorted(rows, key=lambda row: (row["task"], row["layer"])), schema=_usage_schema())


def _usage_schema() -> pa.Schema:
    import pyarrow as pa

    text, whole, real = pa.string(), pa.int64(), pa.float64()
    names = {"task": text, "layer": pa.int32(), "kind": text, "expert": pa.int32(), "rows": whole, "weight": real}
    return pa.schema({**names, "task_share": real, "expert_share": real})


def draw(statistics: Statistics, folder: Path) -> list[Path]:
    """The heat map of each layer, the load over time, and which tasks share experts."""
    paths = [
        plots.save(plots.heat_map(statistics, layer), folder / f"experts_layer{layer}.png")
        for layer in statistics.usage
    ]
    paths.append(plots.save(plots.load_over_time(statistics), folder / "load.png"))
    paths.append(plots.save(plots.similarity(statistics), folder / "similarity.png"))
    return paths
