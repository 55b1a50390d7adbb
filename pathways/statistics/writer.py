"""Appends records to `<model>/statistics`, and keeps the number of files small."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pathways.statistics.counts import SCHEMAS, ExpertName, RoutingCounts, join, record
from pathways.statistics.files import Files, open_files
from pathways.statistics.parts import Part, encode, list_parts, read_part

LAYERS = "layers.json"
FINAL = 9
FINAL_BYTES = 16 << 20


class StatisticsWriter:
    """Writes records as three tables; a second record of the same step and phase replaces the first.

    Files of one table, phase and level are merged as soon as there are `merge_every` of them, until a merged file
    exceeds 16 MiB. So R records leave at most `merge_every` files per table, phase and level, and log(R) levels.

    Args:
        location: `<model>/statistics`, a folder, a `gs://` or `s3://` URL, or `Files`.
        start_step: when resuming, the step resumed from: later records are dropped, because they will come again.
        merge_every: how many files make one bigger file.
    """

    def __init__(self, location: str | Path | Files, start_step: int | None = None, merge_every: int = 32) -> None:
        if merge_every < 2:
            raise ValueError(f"merge_every: expected at least 2, got {merge_every}")
        self.files = open_files(location)
        self.merge_every = merge_every
        self._parts: dict[str, set[Part]] = {}
        for table in SCHEMAS:
            parts, leftovers = list_parts(self.files, table)
            for part in leftovers:
                self.files.delete(part.key)
            self._parts[table] = set(parts)
        if start_step is not None:
            self._truncate(start_step)
        self._experts = read_experts(self.files)

    def append(self, counts: RoutingCounts) -> None:
        """Writes one record.

        Raises:
            OSError: the disk is full or read-only; what was there stays whole.
        """
        self._note_experts(counts)
        for name, table in record(counts).items():
            part = Part(name, counts.phase, counts.step, counts.step)
            older = next((p for p in self._parts[name] if p.level and part.within(p)), None)
            if older is not None:
                kept = read_part(self.files, older)
                kept = kept.filter(pc.not_equal(kept["step"], counts.step))
                self._write(older, join(name, [kept, table]).sort_by("step"))
            elif table.num_rows:
                self._write(part, table)
                self._merge(name, counts.phase)
            elif part in self._parts[name]:
                self._delete(part)

    def _note_experts(self, counts: RoutingCounts) -> None:
        """Adds experts not seen before to `layers.json`, so that one without a row is still listed."""
        experts = {layer: list(names) for layer, names in self._experts.items()}
        for layer in counts.layers:
            known = dict.fromkeys(experts.get(layer.layer, ()))
            experts[layer.layer] = list(known | dict.fromkeys(layer.experts))
        if experts != self._experts:
            layers = [{"layer": i, "runs": runs(experts[i])} for i in sorted(experts)]
            self.files.write(LAYERS, json.dumps({"format": 2, "layers": layers}).encode())
            self._experts = experts

    def _merge(self, name: str, phase: str) -> None:
        for level in range(FINAL - 1):
            parts = sorted(
                (p for p in self._parts[name] if p.phase == phase and p.level == level), key=lambda p: p.first
            )
            if len(parts) < self.merge_every:
                return
            data = encode(join(name, [read_part(self.files, part) for part in parts]))
            new_level = FINAL if len(data) > FINAL_BYTES else level + 1
            merged = Part(name, phase, parts[0].first, max(part.last for part in parts), new_level)
            self.files.write(merged.key, data)
            self._parts[name].add(merged)
            for part in parts:
                self._delete(part)

    def _truncate(self, start_step: int) -> None:
        for parts in self._parts.values():
            for part in [p for p in parts if p.last > start_step]:
                if part.first <= start_step:
                    kept = read_part(self.files, part)
                    kept = kept.filter(pc.less_equal(kept["step"], start_step))
                    self._write(replace(part, last=start_step), kept)
                self._delete(part)

    def _write(self, part: Part, table: pa.Table) -> None:
        self.files.write(part.key, encode(table))
        self._parts[part.table].add(part)

    def _delete(self, part: Part) -> None:
        self.files.delete(part.key)
        self._parts[part.table].discard(part)


def read_experts(files: Files) -> dict[int, list[ExpertName]]:
    """Layer -> all its experts, as `layers.json` says; empty where there is none."""
    try:
        content = json.loads(files.read(LAYERS))
    except FileNotFoundError:
        return {}
    found = {}
    for entry in content["layers"]:
        # Format 1 listed each expert by itself.
        stretches = entry["runs"] if "runs" in entry else [(kind, i, i) for kind, i in entry["experts"]]
        found[entry["layer"]] = [ExpertName(kind, i) for kind, first, last in stretches for i in range(first, last + 1)]
    return found


def runs(experts: Iterable[ExpertName]) -> list[list[Any]]:
    """Experts in their order as `[kind, first, last]`: a bank of twenty thousand is one of these."""
    found: list[list[Any]] = []
    for expert in experts:
        if found and found[-1][0] == expert.kind and found[-1][2] + 1 == expert.index:
            found[-1][2] = expert.index
        else:
            found.append([expert.kind, expert.index, expert.index])
    return found
