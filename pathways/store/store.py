"""The store: opening, committing, going back. See docs/store.md for the layout and the promises.

A commit is one OCDBT transaction over chunks, documents, index, log and head, conditional on the head it was based
on; so it happens whole or not at all, and of two commits based on the same version the second is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Literal

import tensorstore as ts

from pathways.store.compact import Compaction, compact_in_place, compact_into
from pathways.store.locate import Database, local_folder, locked, new_context, not_a_store, plain_errors
from pathways.store.pins import KEY as PINS
from pathways.store.pins import check_pin, pinned, read_pins, stamped_pins
from pathways.store.records import (
    FORMAT,
    FORMAT_VERSION,
    Changes,
    Version,
    decode_version,
    encode_json,
    encode_version,
    log_key,
    summary,
)
from pathways.store.stage import Stage
from pathways.store.verify import damaged
from pathways.store.view import View, fetch, prefix_range
from tasks.errors import UserError

Check = Callable[[View], None]


class Store(View):
    """One opened version of a store. Made by `create` and `open`.

    Attributes:
        version: the number of the version that reads see; a commit or revert moves it to the new one.
        mode: "r", or "w" to commit.
    """

    version: int
    mode: Literal["r", "w"]

    def __init__(self, database: Database, mode: Literal["r", "w"], version: Version) -> None:
        super().__init__(database.path, database.at(version.generation))
        self.mode, self.version, self._database = mode, version.number, database

    @classmethod
    def create(cls, path: str | os.PathLike[str]) -> Store:
        """A new, empty store, opened for writing at version 1.

        Raises:
            UserError: something other than an empty folder is there already, or nothing can be written there.
        """
        path = os.fspath(path)
        with locked(path), plain_errors(path, "creating a store"):
            folder = local_folder(path)
            foreign = folder is not None and {entry.name for entry in folder.iterdir()} - {
                ".lock",
                "d",
                "manifest.ocdbt",
            }
            new = Database(path, new_context())
            database = new.at()
            if foreign or database.read("format").result().value:
                raise UserError(
                    "there is something at this path already",
                    where=path,
                    expected="an empty folder, or a path that does not exist",
                    fix="open it with `Store.open(path, mode='w')`, or choose another path",
                )
            first = Version(1, now(), "created", None, summary({}, 0), new.next_generation())
            transaction = ts.Transaction(atomic=True)
            bound = database.with_transaction(transaction)
            bound.write("format", encode_json({"format": FORMAT, "version": FORMAT_VERSION}), if_equal=b"")
            bound.write("head", encode_json({"number": 1}))
            bound.write(log_key(1), encode_version(first))
            transaction.commit_async().result()
            return cls(Database.find(path), "w", first)

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], version: int | str | None = None, mode: Literal["r", "w"] = "r"
    ) -> Store:
        """Opens one version, by default the newest.

        Args:
            version: its number, or the name that it was pinned by.

        Raises:
            UserError: no store there, a newer format, no such version, or an older version with `mode="w"`.
        """
        path = os.fspath(path)
        with plain_errors(path, "opening the store"):
            place = Database.find(path)
            database = place.at() if version is None else place.readable()
            check_format(path, database.read("format").result().value)
            newest = head_number(database)[0]
            pins = read_pins(database) if isinstance(version, str) else {}
        number = newest if version is None else pinned(path, pins, version) if isinstance(version, str) else version
        if mode == "w" and number != newest:
            raise UserError(
                f"version {number} cannot be written: only the newest can",
                where=path,
                expected=f"version {newest}",
                fix=f"`Store.open(path, mode='w').revert({number}, message)` makes its content the newest version",
            )
        with plain_errors(path, "opening the store"):
            return cls(place, mode, read_version(path, database, number))

    def log(self) -> list[Version]:
        """All versions that can be opened, oldest first, also those newer than the one opened here."""
        with plain_errors(self.path, "reading the log"):
            return read_log(self._database.readable())

    def commit(
        self, changes: Changes, message: str, *, row_chunked: Callable[[str], bool], check: Check | None = None
    ) -> Version:
        """Writes `changes` as a new version, all or nothing, and moves this store to it.

        Args:
            row_chunked: whether an array put whole is stored with one chunk per row of its first axis.
            check: looks at the state about to be committed; whatever it raises aborts the commit and goes through.

        Raises:
            UserError: opened for reading, moved by somebody else meanwhile, unfit changes, full disk, no permission.
                Nothing was written then.
        """
        return self._commit(lambda stage: stage.apply(changes, row_chunked), message, check)

    def revert(self, to: int, message: str, *, check: Check | None = None) -> Version:
        """A new version with the content of version `to`. What both have in common is shared, nothing is lost."""
        target = self.at(to)

        def apply(stage: Stage) -> None:
            for name, entry in stage.keep_only(target).items():
                stage.copy(name, entry, target)

        return self._commit(apply, message, check)

    def pins(self) -> dict[str, int]:
        """Names of versions, whichever of them is open here."""
        with plain_errors(self.path, "reading the pins"):
            return read_pins(self._database.readable())

    def pin(self, name: str, version: int | None = None) -> int:
        """Gives a version (by default the one open here) a name, by which it opens and which compaction keeps.

        No version is made by it. Returns the number of the version.

        Raises:
            UserError: opened for reading, not a name, a name that another version has, or no such version.
        """
        check_pin(self.path, name)
        number = self.version if version is None else version

        def named(database: ts.KvStore, known: dict[str, int]) -> dict[str, int]:
            read_version(self.path, database, number)
            if known.get(name, number) != number:
                raise UserError("Another version has this name.", where=self.path, got=f"{name}, version {known[name]}")
            return {**known, name: number}

        self._change_pins(named)
        return number

    def unpin(self, name: str) -> None:
        """Takes a name away; the version stays until a compaction drops it."""

        def without(_: ts.KvStore, known: dict[str, int]) -> dict[str, int]:
            pinned(self.path, known, name)
            return {other: number for other, number in known.items() if other != name}

        self._change_pins(without)

    def undo(self, message: str | None = None) -> Version:
        """Reverts to the parent of the version opened here."""
        with plain_errors(self.path, "reading the log"):
            parent = read_version(self.path, self._database.at(), self.version).parent
        if parent is None:
            raise UserError("there is nothing before this version", where=self.path, got=f"version {self.version}")
        return self.revert(parent, message or f"undo version {self.version}")

    def at(self, version: int) -> Store:
        """Another version of this store, for reading."""
        with plain_errors(self.path, "opening another version"):
            return Store(self._database, "r", read_version(self.path, self._database.readable(), version))

    def verify(self, version: int | None = None) -> list[str]:
        """Recomputes every digest of a version (by default this one) and names what does not match; empty if whole."""
        return damaged(self if version is None else self.at(version))

    def compact(
        self, destination: str | os.PathLike[str] | None = None, *, keep: Sequence[int] | None = None
    ) -> Compaction:
        """Copies what the versions `keep` need (default: the one opened here) to a new store, or in place.

        Versions that have a name are kept as well. In place is for local stores; other processes must open again
        afterwards. Kept versions keep their numbers.
        """
        if destination is not None:
            log, pins, kept = self._kept(keep)
            sources = [(log[number], self.at(number)) for number in kept]
            return compact_into(self.path, os.fspath(destination), sources, pins)
        self._must_write()
        with locked(self.path):
            with plain_errors(self.path, "reading the head"):
                self._must_be_newest(self._database.at())
            log, pins, kept = self._kept(keep)
            if kept[-1:] != [max(log)]:
                raise UserError(
                    "compaction in place must keep the newest version", expected=str(max(log)), got=str(kept)
                )
            sources = [(log[number], self.at(number)) for number in kept]
            done = compact_in_place(self.path, sources, pins)
        self._database = Database.find(self.path)
        self._move(self.version)
        return done

    def _kept(self, keep: Sequence[int] | None) -> tuple[dict[int, Version], dict[str, int], list[int]]:
        """What compaction needs to know: the log, the pins, and the numbers of all that it keeps, in order."""
        pins = self.pins()
        log = {version.number: version for version in self.log()}
        kept = sorted({*(keep if keep is not None else [self.version]), *pins.values()})
        for number in kept:
            if number not in log:
                raise no_such_version(self.path, number, list(log))
        return log, pins, kept

    def _commit(self, apply: Callable[[Stage], None], message: str, check: Check | None) -> Version:
        self._must_write()
        with locked(self.path):
            with plain_errors(self.path, "reading the head"):
                database = self._database.at()
                condition = self._must_be_newest(database)
                generation = self._database.next_generation()
            stage = Stage(self, database)
            try:
                with plain_errors(self.path, f"preparing {message!r}"):
                    apply(stage)
                if check is not None:
                    check(stage.view)
                written = {
                    "written": stage.written - stage.appended,
                    "appended": stage.appended,
                    "removed": stage.removed - stage.written,
                }
                done = Version(self.version + 1, now(), message, self.version, summary(written, stage.size), generation)
                stage.write("format", encode_json({"format": FORMAT, "version": FORMAT_VERSION}))
                stage.write("head", encode_json({"number": done.number}), if_equal=condition)
                stage.write(log_key(done.number), encode_version(done))
                with plain_errors(self.path, f"committing {message!r}"):
                    self._finish(stage.transaction)
            except BaseException:
                stage.transaction.abort()
                raise
        self._move(done.number)
        return done

    def _finish(self, transaction: ts.Transaction) -> None:
        try:
            transaction.commit_async().result()
        except ValueError as error:
            if "Generation mismatch" not in str(error):
                raise
            raise self._moved(head_number(self._database.at())[0]) from None

    def _change_pins(self, change: Callable[[ts.KvStore, dict[str, int]], dict[str, int]]) -> None:
        """Reads the pins and writes what `change` makes of them, so that no other pin comes in between.

        The head is written with them, so that a commit under way elsewhere fails rather than misses them.
        """
        self._must_write()
        with locked(self.path), plain_errors(self.path, "writing the pins"):
            database = self._database.at()
            condition = self._must_be_newest(database)
            known, stamp = stamped_pins(database)
            pins = change(database, known)
            transaction = ts.Transaction(atomic=True)
            bound = database.with_transaction(transaction)
            bound.write(PINS, encode_json(pins) if pins else None, if_equal=stamp)
            bound.write("head", encode_json({"number": self.version, "pins": sorted(pins)}), if_equal=condition)
            self._finish(transaction)

    def _must_write(self) -> None:
        if self.mode != "w":
            raise UserError(
                "this store was opened for reading",
                where=f"{self.path}, version {self.version}",
                fix="open the newest version with mode='w'",
            )

    def _must_be_newest(self, database: ts.KvStore) -> bytes:
        """The condition for the head's write: it is still what this store was opened at."""
        number, stamp = head_number(database)
        if number != self.version:
            raise self._moved(number)
        return stamp

    def _moved(self, newest: int) -> UserError:
        moved = f"the store moved from version {self.version} to {newest}"
        if newest == self.version:
            moved = "somebody else gave a version a name, or took one away,"
        return UserError(
            f"{moved} while this was made ready; nothing was written",
            where=self.path,
            fix="open the store again and repeat the change on the newest version",
        )

    def _move(self, number: int) -> None:
        with plain_errors(self.path, "opening the new version"):
            version = read_version(self.path, self._database.at(), number)
            self._kv = self._database.at(version.generation)
        self.version = number


def now() -> datetime:
    return datetime.now(UTC)


def head_number(database: ts.KvStore) -> tuple[int, bytes]:
    """The newest version, and the storage generation of the key that says so."""
    result = database.read("head").result()
    return json.loads(result.value)["number"], result.stamp.generation


def read_log(database: ts.KvStore) -> list[Version]:
    keys = sorted(key.decode() for key in database.list(prefix_range("log/")).result())
    return [decode_version(data) for data in fetch(database, keys) if data]


def read_version(path: str, database: ts.KvStore, number: int) -> Version:
    data = database.read(log_key(number)).result().value if 0 < number < 10**10 else b""
    if not data:
        raise no_such_version(path, number, [version.number for version in read_log(database)])
    return decode_version(data)


def no_such_version(path: str, number: int, known: Sequence[int]) -> UserError:
    listed = ", ".join(map(str, known[-20:]))
    return UserError("the store has no such version", where=path, expected=f"one of {listed}", got=str(number))


def check_format(path: str, data: bytes) -> None:
    if not data:
        raise not_a_store(path)
    found = json.loads(data)
    if found.get("format") != FORMAT:
        raise not_a_store(path)
    if found["version"] > FORMAT_VERSION:
        raise UserError(
            "this store was written by a newer version of pathways",
            where=path,
            expected=f"format version {FORMAT_VERSION} or older",
            got=f"format version {found['version']}",
            fix="pip install -U pathways-moe",
        )
