"""What the benchmarks share: child processes, calls timed in turn, memory, bytes read, tables, JSON, pictures."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parent.parent
MB = 1e6
Case = TypeVar("Case", bound=Hashable)
Row = dict[str, Any]


def surroundings(changes: Mapping[str, str | None]) -> dict[str, str]:
    """This process's environment with some variables set, or unset by None."""
    changed = {**os.environ, **changes}
    return {name: value for name, value in changed.items() if value is not None}


def child(module: str, *arguments: object, environment: Mapping[str, str | None] | None = None) -> Any:
    """Runs `python -m module arguments` to its end and gives what the last line it printed says, read as JSON.

    Args:
        environment: see `surroundings`.
    """
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=ROOT, env=surroundings(environment or {}), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def seconds(work: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def in_turn(calls: Mapping[Case, Callable[[], object]], repeats: int, warm_up: int = 1) -> dict[Case, list[float]]:
    """Seconds of each call, all in turn, so that a change of the machine's speed meets all alike.

    Every other round goes backwards, so that none always follows the same one.

    Args:
        calls: each must wait for its own result.
    """
    found: dict[Case, list[float]] = {name: [] for name in calls}
    for turn in range(warm_up + repeats):
        for name, call in list(calls.items())[:: -1 if turn % 2 else 1]:
            taken = seconds(call)
            if turn >= warm_up:
                found[name].append(taken)
    return found


def median_ratio(these: Sequence[float], others: Sequence[float]) -> float:
    """The median over rounds of one call's time over another's in the same round."""
    return statistics.median(a / b for a, b in zip(these, others, strict=True))


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Median, least and greatest."""
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def peak_memory() -> int:
    """The most bytes this process held in memory so far; 0 where the system does not say.

    Of the process's own address space: what `getrusage` says of a child begins at its parent's.
    """
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return 1024 * int(found[1]) if found else 0


def bytes_read() -> int:
    """Bytes this process has asked the system to read so far; 0 where the system does not say."""
    counts = Path("/proc/self/io")
    return int(re.findall(r"rchar: (\d+)", counts.read_text())[0]) if counts.exists() else 0


def print_table(rows: Sequence[Row]) -> None:
    """Rows of the same keys under a head; a float gets three digits."""
    texts = [list(rows[0]), *([_text(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    words = isinstance(next(iter(rows[0].values())), str)
    for line in texts:
        cells = [text.rjust(width) for text, width in zip(line, widths, strict=True)]
        print("  ".join([line[0].ljust(widths[0]) if words else cells[0], *cells[1:]]))


def _text(value: Any) -> str:
    if not isinstance(value, float):
        return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def write_json(path: Path | None, rows: Any) -> None:
    """The figures, where they are asked for."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def save_picture(figure: Any, path: Path, title: str) -> None:
    """Writes a matplotlib figure; an SVG like the other pictures of docs/: with a title, and a ground of its own to be
    read on any page, the same bytes for the same figures."""
    import matplotlib.pyplot as plt

    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "pathways"}):
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    if path.suffix == ".svg":
        text = path.read_text(encoding="utf-8")
        head = re.search(r'<svg [^>]*?width="([^"]+)" height="([^"]+)"[^>]*>', text)
        assert head is not None
        ground = f'<title>{title}</title><rect width="{head[1]}" height="{head[2]}" fill="#ffffff"/>'
        path.write_text(text[: head.end()] + ground + text[head.end() :], encoding="utf-8")
