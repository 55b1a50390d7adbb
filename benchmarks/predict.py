"""Latency and throughput of a model in one process: rows of one task, 1 to 512 at a time.

    python -m benchmarks.predict runs/demo wine test.csv          # or .jsonl

Rows are taken from the file in turn, so no two calls ask the same; programs are compiled before anything is timed.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pathways as pw

SIZES = (1, 8, 64, 512)


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV or JSONL file."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file)) if path.suffix == ".csv" else [json.loads(line) for line in file]


def seconds_of(model: pw.Model, task: str, rows: Iterator[dict[str, Any]], size: int, repeats: int) -> list[float]:
    """Seconds of each call, two left out."""
    found = []
    for _ in range(repeats + 2):
        asked = list(itertools.islice(rows, size))
        began = time.perf_counter()
        model.predict(task, asked)
        found.append(time.perf_counter() - began)
    return found[2:]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("task")
    parser.add_argument("file", type=Path)
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    pw.reuse_memory()
    model = pw.open(options.model)
    rows = itertools.cycle(rows_of(options.file))
    print(f"{'rows':>5}{'median ms':>12}{'slowest ms':>12}{'rows/s':>10}")
    for size in SIZES:
        found = seconds_of(model, options.task, rows, size, options.repeats)
        median = statistics.median(found)
        print(f"{size:>5}{1e3 * median:>12.1f}{1e3 * max(found):>12.1f}{size / median:>10.0f}")


if __name__ == "__main__":
    main()
