"""The folder of a training run: resolved configuration, versions, logs."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import tomli_w

from pathways.config import Config
from tasks.errors import UserError

CONFIG, VERSIONS, LOCK = "config.toml", "versions.json", ".lock"
PACKAGES = ("pathways-moe", "jax", "jaxlib", "flax", "optax", "grain", "tensorstore", "tokenizers", "numpy")


def prepare_folder(folder: Path, config: Config | None = None) -> None:
    """Makes the run's folder and, given the configuration, writes it fully resolved to `config.toml`, and
    `versions.json`.

    Raises:
        UserError: the folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if config is not None:
            (folder / CONFIG).write_text(tomli_w.dumps(resolved(config)), encoding="utf-8")
            (folder / VERSIONS).write_text(json.dumps(versions(), indent=2) + "\n", encoding="utf-8")
        elif not os.access(folder, os.W_OK):
            raise PermissionError("no permission to write here")
    except OSError as error:
        raise UserError(
            "The run's folder cannot be written.", where=str(folder), got=str(error), fix="choose another --out"
        ) from None


@contextmanager
def sole_user(folder: Path) -> Iterator[None]:
    """Holds a run's folder for this process: two trainings in one folder would overwrite each other's checkpoints.

    The system lets go of the lock when the process ends, however it ends.

    Where the file system has no locks, nothing is held.

    Raises:
        UserError: another process holds it, or the lock cannot be written.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    try:
        opened = (folder / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError("The run's folder cannot be written.", where=str(folder / LOCK), got=str(error)) from None
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                "Another process trains in this folder.",
                where=str(folder),
                got=f"process {file.read().strip() or 'unknown'}",
                fix="wait until it is done, or choose another --out",
            ) from None
        except OSError:
            yield
            return
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def resolved(config: Config) -> dict[str, Any]:
    """The configuration as plain tables, every default filled in, paths absolute: `load_config` reads it back."""
    tables = _plain(dataclasses.asdict(config))
    for table in tables["tasks"]:
        for split in ("train", "valid", "test"):
            if split in table:
                table[split] = str(Path(table[split]).absolute())
        if "where" in table:
            column, value = table["where"]
            table["where"] = {column: value}
    return tables


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide the numbers."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value if item is not None]
    return value
