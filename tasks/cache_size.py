"""Keeping the cache of encoded data within a size: what was used longest ago goes first."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from pathlib import Path

MARK = "meta.json"
"""The file of an encoded split whose time says when it was last used."""

FRESH_SECONDS = 24 * 3600.0
"""What was used within a day stays, however large: a run may be about to open it."""


def mark_used(folder: Path) -> None:
    """Notes that an encoded split is used now, where the cache may be written."""
    with contextlib.suppress(OSError):
        os.utime(folder / MARK)


def trim(cache: Path, most: int, now: float | None = None) -> int:
    """Removes encoded splits, the one used longest ago first, until at most `most` bytes are left.

    A process that has a removed split open reads on: its files are mapped. One that asks for it again encodes it anew.

    Args:
        cache: the folder that holds a folder for each split.
        most: bytes.
        now: seconds since 1970.

    Returns:
        Bytes removed.
    """
    now = time.time() if now is None else now
    found = []
    for folder in cache.iterdir() if cache.is_dir() else ():
        with contextlib.suppress(OSError):  # another process may be removing it
            size = sum(path.stat().st_size for path in folder.iterdir())
            found.append(((folder / MARK).stat().st_mtime, size, folder))
    excess = sum(size for _, size, _ in found) - most
    removed = 0
    for used, size, folder in sorted(found):
        if removed >= excess or now - used < FRESH_SECONDS:
            break
        shutil.rmtree(folder, ignore_errors=True)
        removed += size
    return removed
