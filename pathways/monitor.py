"""What a run shows while it goes: a live line, TensorBoard events, and `metrics.jsonl`.

In the run's folder:
    metrics.jsonl: one object per log, `{"step": ..., "time": seconds since 1970, <metric>: value or null}`.
    events.jsonl: one object per message, `{"step": ..., "time": ..., "message": ...}`.
    tensorboard/: the metrics as scalars.
On resuming, what was logged after the step resumed from is dropped: it will come again.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pathways.report import count, duration, integer, number

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

METRICS, EVENTS, CURVES = "metrics.jsonl", "events.jsonl", "curves.png"
LINE_SECONDS = 10.0
"""Without a terminal, one line is printed at most this often."""
SHOWN = {
    "loss": ("loss", number),
    "rows_per_second": ("rows/s", count),
    "balance": ("balance", number),
    "learning_rate": ("lr", number),
}
"""Metrics on the line: name -> (label, how it is written). `balance` is the largest over the mean load."""


class Monitor:
    """Logs a run of `total_steps` steps. A context manager: leaving it closes the files and the line.

    Args:
        folder: the run's folder, made where absent.
        total_steps: where the run ends.
        start_step: the step resumed from; metrics after it are dropped.
        quiet: print nothing; files are written all the same.
        console: where to print; by default standard error.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        start_step: int = 0,
        quiet: bool = False,
        console: Console | None = None,
    ) -> None:
        self.folder, self.total_steps, self.step, self.quiet = Path(folder), total_steps, start_step, quiet
        self.folder.mkdir(parents=True, exist_ok=True)
        self._start_step = start_step
        self._files: dict[str, IO[str]] = {}
        for name in (METRICS, EVENTS):
            drop_after(self.folder / name, start_step)
            self._files[name] = (self.folder / name).open("a", encoding="utf-8")
        self._times: deque[tuple[float, int]] = deque([(time.monotonic(), start_step)], maxlen=50)
        self._shown: dict[str, float] = {}
        self._printed = -math.inf
        self._events: Any = None
        self._console = None if quiet else console or _stderr()
        self._bar = (
            _bar(self._console, total_steps, start_step) if self._console and self._console.is_terminal else None
        )

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records the metrics of a step; a value that is not finite is written as null.

        `loss`, `rows_per_second`, `balance` and `learning_rate` appear on the line.
        """
        values = {name: float(value) for name, value in metrics.items()}
        self.step = step
        self._write(METRICS, {name: value if math.isfinite(value) else None for name, value in values.items()})
        self._log_events(step, values)
        self._times.append((time.monotonic(), step))
        self._shown |= {name: value for name, value in values.items() if name in SHOWN}
        self._show()

    def event(self, message: str) -> None:
        """Records something worth a line of its own, such as a saved checkpoint."""
        self._write(EVENTS, {"message": message})
        if self._console is not None:
            self._console.print(message, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Ends the line and closes the files; a second call does nothing."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        elif self._console is not None and self._shown and self._files:
            self._line()
        if self._events is not None:
            self._events.close()
            self._events = None
        for file in self._files.values():
            file.close()
        self._files = {}

    def eta(self) -> float | None:
        """Seconds to the end at the pace of the last logs, `None` before the first two."""
        (begin, first), (end, last) = self._times[0], self._times[-1]
        return (self.total_steps - last) * (end - begin) / (last - first) if last > first else None

    def _write(self, name: str, content: dict[str, Any]) -> None:
        line = json.dumps({"step": self.step, "time": round(time.time(), 3), **content}, ensure_ascii=False)
        self._files[name].write(line + "\n")
        self._files[name].flush()

    def _log_events(self, step: int, values: dict[str, float]) -> None:
        if self._events is None:
            from tensorboardX import SummaryWriter

            folder = str(self.folder / "tensorboard")
            self._events = SummaryWriter(folder, purge_step=self._start_step + 1, flush_secs=10)
        for name, value in values.items():
            if math.isfinite(value):
                self._events.add_scalar(name, value, step)

    def _text(self) -> str:
        parts = [f"{SHOWN[name][0]} {SHOWN[name][1](self._shown[name])}" for name in SHOWN if name in self._shown]
        eta = self.eta()
        if eta is not None and self.step < self.total_steps:
            parts.append(f"{duration(round(eta))} left")
        return "  ".join(parts)

    def _show(self) -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self.step, text=self._text())
        elif self._console is not None and time.monotonic() - self._printed >= LINE_SECONDS:
            self._line()

    def _line(self) -> None:
        assert self._console is not None
        self._printed = time.monotonic()
        text = f"step {integer(self.step)}/{integer(self.total_steps)}  {self._text()}"
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def drop_after(path: Path, step: int) -> None:
    """Removes the lines of a `.jsonl` file whose step is larger, and a last line that was cut short; atomically."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith(b"\n") and _step(line) <= step]
    if len(kept) < len(lines):
        partial = path.with_name(path.name + ".partial")
        with partial.open("wb") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of a `metrics.jsonl`; a line that is not whole is left out."""
    lines = path.read_bytes().splitlines()
    return [json.loads(line) for line in lines if _step(line) < math.inf]


def _step(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True)


def _bar(console: Console, total: int, start: int) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[text]}", markup=False))
    bar = Progress(*columns, console=console, refresh_per_second=4)
    bar.add_task("steps", total=total, completed=start, text="")
    bar.start()
    return bar
