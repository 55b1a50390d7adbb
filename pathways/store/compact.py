"""Compaction: a new database with the content of the kept versions only, their numbers unchanged.

OCDBT never reclaims space, and a commit that was killed leaves data files that nothing refers to. In place, the new
database is built beside the old one, its data files (random names) are moved in, and the manifest is replaced by one
rename: a crash before it leaves the old store, a crash after it the new one, each whole.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pathways.store.locate import Database, local_folder, locked, new_context, plain_errors
from pathways.store.pins import KEY as PINS
from pathways.store.records import FORMAT, FORMAT_VERSION, Version, encode_json, encode_version, log_key
from pathways.store.stage import Stage
from pathways.store.view import View
from tasks.errors import UserError

PART_BYTES = 256 << 20
"""Copied through memory at a time."""

WORK_FOLDER = ".compacting"


@dataclass(frozen=True)
class Compaction:
    """What a compaction did: bytes on disk of the whole store before and after."""

    before: int
    after: int


def compact_into(
    path: str, destination: str, sources: Sequence[tuple[Version, View]], pins: Mapping[str, int]
) -> Compaction:
    """Writes the versions `sources`, oldest first, to a new store at `destination`."""
    new = Database(destination, new_context())
    with locked(destination), plain_errors(destination, "compacting"):
        if new.manifest() is not None:
            raise UserError("there is a store at the destination already", where=destination)
        copy_versions(new, sources, pins)
    return Compaction(stored_bytes(path), stored_bytes(destination))


def compact_in_place(path: str, sources: Sequence[tuple[Version, View]], pins: Mapping[str, int]) -> Compaction:
    """Replaces a local store by its compaction. The caller holds the lock."""
    folder = local_folder(path)
    if folder is None:
        raise UserError("only a local store is compacted in place", where=path, fix="name a destination")
    before = stored_bytes(path)
    work = folder / WORK_FOLDER
    with plain_errors(path, "compacting"):
        shutil.rmtree(work, ignore_errors=True)
        copy_versions(Database(str(work), new_context()), sources, pins)
        old_files = list((folder / "d").iterdir())
        for entry in (work / "d").iterdir():
            entry.rename(folder / "d" / entry.name)
        sync_folder(folder / "d")
        (work / "manifest.ocdbt").replace(folder / "manifest.ocdbt")
        sync_folder(folder)
        for entry in old_files:
            entry.unlink()
        shutil.rmtree(work)
    return Compaction(before, stored_bytes(path))


def copy_versions(target: Database, sources: Sequence[tuple[Version, View]], pins: Mapping[str, int]) -> None:
    """Copies each version on top of the one before, so that what they share is written once.

    The log says which generation holds a version; the generations between, of parts, are never looked at.
    """
    database = target.at()
    for version, source in sources:
        stage = Stage(View(target.path, database), database)
        for name, entry in stage.keep_only(source).items():
            stage.copy(name, entry, source)
            if stage.size >= PART_BYTES:
                stage = stage.commit_part()
        generation = target.next_generation()
        stage.write("format", encode_json({"format": FORMAT, "version": FORMAT_VERSION}))
        stage.write("head", encode_json({"number": version.number}))
        if pins:
            stage.write(PINS, encode_json(pins))
        stage.write(log_key(version.number), encode_version(Version(**{**vars(version), "generation": generation})))
        stage.transaction.commit_async().result()


def stored_bytes(path: str) -> int:
    """Bytes that a store takes where it lives."""
    folder = local_folder(path)
    if folder is not None:
        return sum(entry.stat().st_size for entry in folder.rglob("*") if entry.is_file())
    base = Database(path, new_context()).base()
    return sum(len(base.read(key).result().value) for key in base.list().result())


def sync_folder(folder: Path) -> None:
    """Makes renames in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
