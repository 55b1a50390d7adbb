"""Compiles the C++ of this folder once for each machine, and makes it known to XLA."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import jax

SWITCH = "PATHWAYS_NATIVE"
"""Set to 0 in the environment to build and use nothing."""
SOURCE = Path(__file__).with_name("grouped.cc")
TARGETS = ("forward", "inputs", "weights")
COMPILERS = ("g++", "clang++", "c++")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-w")
LONGEST = 120.0
"""Seconds that a compilation may take."""


def user_cache() -> Path:
    """Where pathways keeps what can be made again: `$PATHWAYS_CACHE`, else a folder in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("PATHWAYS_CACHE") or f"{home}/pathways").expanduser()


@functools.cache
def available() -> bool:
    """Whether the products can be called in this process; builds and registers them at the first call."""
    if os.environ.get(SWITCH) == "0" or not sys.platform.startswith(("linux", "darwin")):
        return False
    try:
        library = ctypes.CDLL(str(_built()))
        for name in TARGETS:
            handler = jax.ffi.pycapsule(getattr(library, f"pathways_grouped_{name}"))
            jax.ffi.register_ffi_target(f"pathways_grouped_{name}", handler, platform="cpu")
    except (OSError, subprocess.SubprocessError, AttributeError):
        return False
    return True


def _built() -> Path:
    """The shared library; compiled if this machine has none of this source yet.

    Raises:
        OSError: no compiler, or the cache folder cannot be written.
        subprocess.SubprocessError: the compiler failed, or took too long.
    """
    library = user_cache() / "native" / f"grouped-{_key()}.so"
    if library.exists():
        return library
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise FileNotFoundError("no C++ compiler")
    library.parent.mkdir(parents=True, exist_ok=True)
    unfinished = library.with_suffix(f".{os.getpid()}")
    try:
        command = [compiler, *FLAGS, f"-I{jax.ffi.include_dir()}", str(SOURCE), "-o", str(unfinished)]
        subprocess.run(command, check=True, capture_output=True, timeout=LONGEST)
        unfinished.replace(library)
    finally:
        unfinished.unlink(missing_ok=True)
    return library


def _key() -> str:
    """Of all that the compiled code depends on: the source, jaxlib's headers, and what the processor can do."""
    parts = [
        SOURCE.read_bytes(),
        metadata.version("jaxlib").encode(),
        platform.machine().encode(),
        " ".join(FLAGS).encode(),
    ]
    described = Path("/proc/cpuinfo")
    if described.exists():
        lines = described.read_text(encoding="utf-8", errors="replace").splitlines()
        parts.append(next((line for line in lines if line.startswith(("flags", "Features"))), "").encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
