"""Compiles the C++ of this folder once for each machine, and makes it known to XLA."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

SWITCH = "PATHWAYS_NATIVE"
"""Set to 0 in the environment to build and use nothing."""
SOURCE = Path(__file__).with_name("grouped.cc")
TARGETS = ("forward", "inputs", "weights")
COMPILERS = ("g++", "clang++", "c++")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-w")
LONGEST = 120.0
"""Seconds that a compilation may take."""

_lock = threading.Lock()
_found: frozenset[str] | None = None


def user_cache() -> Path:
    """Where pathways keeps what can be made again: `$PATHWAYS_CACHE`, else a folder in the user's cache folder.

    It stands in the lowest room that needs it; `pathways.data.cache_folder` is the same for the rest.
    """
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("PATHWAYS_CACHE") or f"{home}/pathways").expanduser()


def available(dtype: Any = "float32") -> bool:
    """Whether the products can be called in this process for rows of this type; the first call builds them.

    There is float32 and, where the processor multiplies it, bfloat16.
    """
    global _found
    with _lock:
        if _found is None:
            _found = _register() if _wanted() else frozenset()
        return jax.numpy.dtype(dtype).name in _found


def _wanted() -> bool:
    return os.environ.get(SWITCH) != "0" and sys.platform.startswith(("linux", "darwin"))


def _register() -> frozenset[str]:
    """The types that it can multiply; none if it cannot be built or loaded."""
    try:
        library = _loaded()
        for name in TARGETS:
            handler = jax.ffi.pycapsule(getattr(library, f"pathways_grouped_{name}"))
            jax.ffi.register_ffi_target(f"pathways_grouped_{name}", handler, platform="cpu")
    except (OSError, subprocess.SubprocessError, AttributeError, RuntimeError, ValueError, ImportError):
        return frozenset()
    return frozenset(("float32", "bfloat16") if library.pathways_grouped_has_bfloat16() else ("float32",))


def _loaded() -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(built()))
    except OSError:
        # A file that was cut off or damaged is made once more.
        _place().unlink(missing_ok=True)
        return ctypes.CDLL(str(built()))


def built() -> Path:
    """The shared library; compiled if this machine has none of this source yet.

    Raises:
        OSError: no compiler, or the cache folder cannot be written or could be written by others.
        subprocess.SubprocessError: every compiler failed, or took too long.
    """
    library = _place()
    library.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not library.exists():
        _compile(library)
    for path in (library.parent, library):
        # What is loaded runs as this user, so nobody else may have put it there.
        found = path.stat()
        if found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise PermissionError(f"{path} can be written by others")
    return library


def _compile(library: Path) -> None:
    compilers = [found for name in COMPILERS if (found := shutil.which(name))]
    failed = library.with_suffix(".failed")
    tried = " ".join(compilers)
    if not compilers or (failed.exists() and failed.read_text(encoding="utf-8").startswith(f"{tried}\n")):
        raise FileNotFoundError(f"no C++ compiler that can build it; see {failed}")
    said = ""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        unfinished = Path(folder) / library.name
        for compiler in compilers:
            command = [compiler, *FLAGS, f"-I{jax.ffi.include_dir()}", str(SOURCE), "-o", str(unfinished)]
            done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=LONGEST)
            if done.returncode == 0:
                unfinished.chmod(0o700)
                unfinished.replace(library)
                return
            said += done.stderr
    # So that not every start tries again what cannot be.
    failed.write_text(f"{tried}\n{said}", encoding="utf-8")
    raise subprocess.SubprocessError(f"no compiler could build it; see {failed}")


def _place() -> Path:
    return user_cache() / "native" / f"grouped-{_key()}.so"


def _key() -> str:
    """Of all that the compiled code depends on: the source, jaxlib's headers, and what the processor can do."""
    names = (metadata.version("jaxlib"), platform.machine(), *FLAGS)
    parts = [SOURCE.read_bytes(), *(name.encode() for name in names)]
    described = Path("/proc/cpuinfo")
    if described.exists():
        lines = described.read_text(encoding="utf-8", errors="replace").splitlines()
        parts.append(next((line for line in lines if line.startswith(("flags", "Features"))), "").encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
