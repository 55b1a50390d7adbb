"""A profile of a few training steps, to see where their time goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from pathways.monitor import Monitor

FOLDER = "profile"
SKIPPED, PROFILED = 10, 10
"""Steps left out (compiling, warming up), and steps recorded."""


class Profiler:
    """Records the steps `first + SKIPPED + 1 .. first + SKIPPED + PROFILED` of a run, if given a folder.

    The folder opens in xprof; its `perfetto_trace.json.gz` opens in Perfetto (https://ui.perfetto.dev).
    """

    def __init__(self, folder: Path | None, first: int, last: int, monitor: Monitor) -> None:
        self.folder, self.monitor, self.recording = folder, monitor, False
        self.start = first + SKIPPED + 1
        self.stop = min(self.start + PROFILED - 1, last)
        if folder is not None and self.start > last:
            monitor.event(f"no profile: it needs more than {SKIPPED} steps, {last - first} are left")
            self.folder = None

    def before(self, step: int) -> None:
        """Begins to record if this is the first step to be recorded."""
        if self.folder is not None and step == self.start:
            jax.profiler.start_trace(self.folder, create_perfetto_trace=True)
            self.recording = True

    def after(self, step: int, result: Any) -> None:
        """Waits for the last step that is recorded, and writes the profile."""
        if self.recording and step == self.stop:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Writes what was recorded, also of a run that ends in between."""
        if self.recording and self.folder is not None:
            self.recording = False
            jax.profiler.stop_trace()
            traces = sorted(self.folder.rglob("perfetto_trace.json.gz"))
            self.monitor.event(f"profile from step {self.start} on: {traces[-1] if traces else self.folder}")
