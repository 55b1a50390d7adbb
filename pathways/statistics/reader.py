"""Asking: the stored tables, the derived ones, SQL over all of them, and the similarity of tasks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pathways.statistics.counts import PHASES, SCHEMAS, ExpertName, join
from pathways.statistics.files import Files, open_files
from pathways.statistics.parts import list_parts, read_part
from pathways.statistics.sql import run_sql
from pathways.statistics.usage import (
    LayerUsage,
    column,
    expert_table,
    latest_records,
    layer_table,
    layer_usages,
    similarity,
    task_table,
)
from pathways.statistics.writer import read_experts
from tasks.errors import UserError


class Statistics:
    """The routing statistics of a model.

    `routing`, `pairs` and `entropy` are what was stored, all phases and steps. `experts`, `tasks` and `layers` are
    derived, for one phase, and each task counts in them with its latest `window` records.

    Args:
        routing, pairs, entropy: tables of `SCHEMAS`.
        experts: layer -> all its experts.
        phase: of the derived tables; by default the first of train, valid, test, predict that has records.
        tasks: the tasks to count, in order, those of them that have records in the phase; by default all that have,
            sorted.
        window: how many records of each task count.

    Raises:
        UserError: no record of the phase.
    """

    def __init__(
        self,
        routing: pa.Table,
        pairs: pa.Table,
        entropy: pa.Table,
        experts: dict[int, list[ExpertName]],
        *,
        phase: str | None = None,
        tasks: Sequence[str] | None = None,
        window: int = 1,
    ) -> None:
        self.routing, self.pairs, self.entropy = routing, pairs, entropy
        self.expert_names, self.window = experts, window
        self._tasks = tasks
        present = set(pc.unique(entropy["phase"]).to_pylist())
        self.phases = [name for name in PHASES if name in present]
        if not self.phases or (phase is not None and phase not in self.phases):
            raise UserError(
                "there are no routing statistics" + (f" of the phase {phase!r}" if phase else ""),
                expected=f"one of the phases {', '.join(self.phases or PHASES)}",
                fix="train or evaluate the model: both record statistics",
            )
        self.phase: str = phase or self.phases[0]
        recorded = pc.unique(entropy.filter(pc.equal(entropy["phase"], self.phase))["task"]).to_pylist()
        self.task_names = sorted(recorded) if tasks is None else [task for task in tasks if task in recorded]

    @classmethod
    def open(
        cls,
        location: str | Path | Files,
        *,
        phase: str | None = None,
        tasks: Sequence[str] | None = None,
        experts: dict[int, list[ExpertName]] | None = None,
        since: int = 0,
        window: int = 1,
    ) -> Statistics:
        """Reads `<model>/statistics`, a folder or a URL.

        Args:
            experts: layer -> experts, from the model; by default all that were ever recorded.
            since: leave out records before this step; files that end before it are not read.

        Raises:
            UserError: there is nothing, or a file is damaged.
        """
        files = open_files(location)
        tables = {name: _read_table(files, name, since) for name in SCHEMAS}
        try:
            return cls(**tables, experts=experts or read_experts(files), phase=phase, tasks=tasks, window=window)
        except UserError as error:
            raise UserError(error.problem, where=str(files), expected=error.expected, fix=error.fix) from None

    def of(self, phase: str) -> Statistics:
        """The same tables, derived for another phase."""
        stored = (self.routing, self.pairs, self.entropy, self.expert_names)
        return Statistics(*stored, phase=phase, tasks=self._tasks, window=self.window)

    def latest(self, phase: str) -> Statistics:
        """Only the last record of a phase: every number in it is about the same rows."""
        in_phase = [t.filter(pc.equal(t["phase"], phase)) for t in (self.routing, self.pairs, self.entropy)]
        last = pc.max(in_phase[2]["step"])
        routing, pairs, entropy = (t.filter(pc.equal(t["step"], last)) for t in in_phase)
        return Statistics(routing, pairs, entropy, self.expert_names, phase=phase, tasks=self._tasks, window=1)

    @cached_property
    def usage(self) -> dict[int, LayerUsage]:
        """Layer -> its `[N, E]` matrices, N in the order of `task_names`."""
        tables = [t.filter(pc.equal(t["phase"], self.phase)) for t in (self.routing, self.entropy)]
        routing, entropy = latest_records(tables[0], tables[1], self.task_names, self.window)
        return layer_usages(routing, entropy, self.task_names, self.expert_names)

    @cached_property
    def experts(self) -> pa.Table:
        """One row per expert: rows, share, weight, its tasks, flags."""
        return expert_table(self.usage, self.task_names, self.phase)

    @cached_property
    def tasks(self) -> pa.Table:
        """One row per task: rows, how many experts it uses, its nearest task."""
        return task_table(self.usage, self.task_names, self.phase)

    @cached_property
    def layers(self) -> pa.Table:
        """One row per layer: balance, entropy, counts of flags."""
        return layer_table(self.usage, self.phase)

    @property
    def tables(self) -> dict[str, pa.Table]:
        """All six by name, as SQL sees them."""
        names = ("routing", "pairs", "entropy", "experts", "tasks", "layers")
        return {name: getattr(self, name) for name in names}

    def sql(self, query: str) -> pa.Table:
        """Runs one SELECT of DuckDB over the six tables.

        Raises:
            UserError: the query does not run, or does more than read.
        """
        return run_sql(self.tables, query)

    def similarity(self, layer: int | None = None) -> tuple[list[str], np.ndarray]:
        """The cosine of the tasks' shares of experts, of one layer or of all side by side.

        Returns:
            The names of the N tasks and `[N, N]`: 1 for the same experts in the same shares, 0 for none in common.
        """
        usages = list(self.usage.values()) if layer is None else [self.layer_usage(layer)]
        return self.task_names, similarity(usages)

    def layer_usage(self, layer: int) -> LayerUsage:
        """Raises UserError for a layer that does not route."""
        if layer not in self.usage:
            routed = ", ".join(map(str, self.usage))
            raise UserError("no such routed layer", expected=f"one of the layers {routed}", got=str(layer))
        return self.usage[layer]

    def balance_over_time(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Layer -> (steps `[R]`, load `[R, E]`): the rows of each expert in each record of the phase.

        A record of a few tasks alone, such as that of an added task, says nothing of the whole: records with less than
        half of the tasks of the fullest one are left out.
        """
        routing = self.routing.filter(pc.equal(self.routing["phase"], self.phase))
        pairs = pa.table({"step": routing["step"], "task": routing["task"].cast(pa.string())})
        tasks = pairs.group_by("step").aggregate([("task", "count_distinct")])
        most = pc.max(tasks["task_count_distinct"]).as_py() or 0
        full = tasks.filter(pc.greater_equal(pc.multiply(tasks["task_count_distinct"], 2), most))["step"]
        routing = routing.filter(pc.is_in(routing["step"], full.combine_chunks()))
        names = pa.table({"layer": routing["layer"], "step": routing["step"], "rows": routing["rows"]})
        names = names.append_column("kind", routing["kind"].cast(pa.string())).append_column("e", routing["expert"])
        summed = names.group_by(["layer", "step", "kind", "e"]).aggregate([("rows", "sum")])
        series = {}
        for layer, experts in sorted(self.expert_names.items()):
            part = summed.filter(pc.equal(summed["layer"], layer))
            place = {expert: i for i, expert in enumerate(experts)}
            index = [
                place.get(ExpertName(kind, e), -1)
                for kind, e in zip(part["kind"].to_pylist(), part["e"].to_pylist(), strict=True)
            ]
            steps, at = np.unique(column(part, "step"), return_inverse=True)
            load = np.zeros((len(steps), len(experts) + 1))
            load[at, index] = column(part, "rows_sum")
            series[layer] = (steps, load[:, :-1])
        return series


def _read_table(files: Files, name: str, since: int) -> pa.Table:
    """All parts of a table; a part that a writer merges away meanwhile is looked for again."""
    for attempt in range(5):
        parts, _ = list_parts(files, name)
        try:
            table = join(name, [read_part(files, part) for part in parts if part.last >= since])
            return table.filter(pc.greater_equal(table["step"], since)) if since else table
        except FileNotFoundError:
            if attempt == 4:
                raise
    raise AssertionError
