"""The C library's allocator, told to keep what it has.

XLA's CPU backend allocates its temporary buffers afresh in every step. By default glibc maps large ones from the system
and gives them back when they are freed, so each step pays for its page faults again: a step of the shared-data model
took 1.6 times as long by default as with the settings below (docs/benchmarks.md).
"""

from __future__ import annotations

import ctypes
import os
import sys

SWITCH = "PATHWAYS_REUSE_MEMORY"
"""Set to 0 in the environment to leave the allocator as it is."""

# Parameters of mallopt(3), from malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_NEVER = -1
_SETTINGS = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER), (_TOP_PAD, 64 << 20))


def reuse_memory() -> bool:
    """Makes this process keep freed memory and use it again; call it before the first array is made.

    For programs that train or predict on CPU; the `pathways` command does it at its start. The process holds on to the
    most memory that it ever used. Nothing happens without glibc, or with `PATHWAYS_REUSE_MEMORY=0`.

    Returns:
        Whether the allocator took the settings.
    """
    if os.environ.get(SWITCH) == "0" or not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    taken = [library.mallopt(parameter, value) == 1 for parameter, value in _SETTINGS]
    return all(taken)
