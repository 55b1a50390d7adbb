"""Reading one state of a store: a committed version, or the uncommitted state that a commit's check looks at.

Only the bytes of the names and rows asked for are read; many reads are in flight at once.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from itertools import islice
from typing import Any

import numpy as np
import tensorstore as ts

from pathways.store.locate import plain_errors
from pathways.store.records import DTYPES, HASH_BYTES, Entry, chunk_key, decode_entry, hash_bytes, raw
from tasks.errors import UserError

IN_FLIGHT = 256
"""Reads under way at once: enough to hide latency, few enough that values waiting do not fill memory."""

Rows = Sequence[int] | np.ndarray | slice | None


def prefix_range(prefix: str) -> ts.KvStore.KeyRange:
    """All keys that start with `prefix` (not empty)."""
    start = prefix.encode()
    return ts.KvStore.KeyRange(start, start[:-1] + bytes([start[-1] + 1]))


def fetch(kv: ts.KvStore, keys: Iterable[str]) -> Iterator[bytes | None]:
    """The values of `keys`, in order; `None` for a missing key."""
    source = iter(keys)
    waiting = deque(kv.read(key) for key in islice(source, IN_FLIGHT))
    while waiting:
        result = waiting.popleft().result()
        for key in islice(source, 1):
            waiting.append(kv.read(key))
        yield result.value if result.state == "value" else None


class View:
    """Names, arrays, documents and blobs of one state.

    Args:
        path: where, for messages.
        kv: the database at that state; bound to the transaction for an uncommitted one.
        base: for an uncommitted state, the view it changes.
        pending: for an uncommitted state, the index entries that changed; `None` for a removed name.
    """

    def __init__(
        self, path: str, kv: ts.KvStore, base: View | None = None, pending: Mapping[str, Entry | None] | None = None
    ) -> None:
        self.path, self._kv, self._base = path, kv, base
        self._pending: Mapping[str, Entry | None] = {} if pending is None else pending

    def names(self, prefix: str = "") -> list[str]:
        """All names that start with `prefix`, sorted."""
        if self._base is not None:
            standing = set(self._base.names(prefix))
            changed = {name: entry for name, entry in self._pending.items() if name.startswith(prefix)}
            return sorted((standing - changed.keys()) | {name for name, entry in changed.items() if entry is not None})
        with plain_errors(self.path, "listing names"):
            found = self._kv.list(prefix_range(f"index/{prefix}"), strip_prefix_length=len("index/")).result()
        return sorted(key.decode() for key in found)

    def find(self, names: Iterable[str]) -> list[Entry | None]:
        """The index entries of `names`; `None` for those that do not exist."""
        names = list(names)
        if self._base is not None:
            rest = iter(self._base.find(name for name in names if name not in self._pending))
            return [self._pending[name] if name in self._pending else next(rest) for name in names]
        with plain_errors(self.path, "reading the index"):
            return [
                decode_entry(data) if data else None for data in fetch(self._kv, (f"index/{name}" for name in names))
            ]

    def has(self, name: str) -> bool:
        return self.find([name])[0] is not None

    def entry(self, name: str, kind: str | None = None) -> Entry:
        """The index entry of `name`. Raises UserError, with the nearest name, if there is none of that kind."""
        found = self.find([name])[0]
        if found is None:
            close = get_close_matches(name, self.names(name.split("/")[0]) or self.names(), n=1)
            fix = f"did you mean {close[0]!r}?" if close else None
            raise UserError("the store has no such name", where=self.path, got=repr(name), fix=fix)
        if kind is not None and found.kind != kind:
            raise UserError(f"{name!r} is not of this kind", where=self.path, expected=f"a {kind}", got=found.kind)
        return found

    def array_info(self, name: str) -> tuple[tuple[int, ...], np.dtype, bool]:
        """Shape, type, and whether there is one chunk per row."""
        entry = self.entry(name, "array")
        return entry.shape, DTYPES[entry.dtype], entry.row_chunked

    def digest(self, name: str) -> str:
        """The content hash recorded at the commit, 32 hex digits. Equal digests mean equal content."""
        return self.entry(name).digest

    def digests(self, prefix: str = "") -> dict[str, str]:
        """Name -> digest of all names that start with `prefix`."""
        names = self.names(prefix)
        return {name: entry.digest for name, entry in zip(names, self.find(names), strict=True) if entry is not None}

    def row_digests(self, name: str) -> list[str]:
        """The content hash of each row of a row-chunked array, 32 hex digits each."""
        entry = self.entry(name, "array")
        if not entry.row_chunked:
            raise UserError("this array has one chunk in all, so its rows have no digests", where=name)
        return [part.hex() for part in self.row_hashes(name, entry)]

    def row_hashes(self, name: str, entry: Entry) -> list[bytes]:
        data = self._content(f"hashes/{name}", entry.shape[0] * HASH_BYTES)
        return [data[i : i + HASH_BYTES] for i in range(0, len(data), HASH_BYTES)]

    def document(self, name: str) -> Any:
        return json.loads(self.encoded(name, self.entry(name, "document")))

    def blob(self, name: str) -> bytes:
        return self.encoded(name, self.entry(name, "blob"))

    def encoded(self, name: str, entry: Entry) -> bytes:
        """The bytes of a document or blob, checked against its digest."""
        key = f"{entry.kind}s/{name}"
        data = self._content(key)
        if hash_bytes(data).hex() != entry.digest:
            raise self._damaged(key, f"content of digest {entry.digest}", f"{len(data)} bytes of another")
        return data

    def read(self, name: str, rows: Rows = None) -> np.ndarray:
        """An array, or the asked rows of it in the asked order; of a row-chunked array only those rows are read."""
        return self.read_many({name: rows})[name]

    def read_many(self, wanted: Mapping[str, Rows]) -> dict[str, np.ndarray]:
        """Several arrays at once: name -> rows (`None`: all) gives name -> a new array.

        Raises:
            UserError: unknown name, row out of range, or a chunk that is missing or cut short.
        """
        entries = {
            name: entry if entry is not None and entry.kind == "array" else self.entry(name, "array")
            for name, entry in zip(wanted, self.find(wanted), strict=True)
        }
        chosen = {name: choose_rows(name, entries[name], rows) for name, rows in wanted.items()}
        outputs = {name: allocate(entries[name], chosen[name]) for name in wanted}
        places = [
            (chunk_key(name, entries[name], chunk), place)
            for name, output in outputs.items()
            for chunk, place in chunk_places(entries[name], chosen[name], output)
        ]
        with plain_errors(self.path, "reading arrays"):
            for (key, place), value in zip(places, fetch(self._kv, (key for key, _ in places)), strict=True):
                place[:] = np.frombuffer(self._whole(key, value, place.size), np.uint8)
        for name, entry in entries.items():
            if not entry.row_chunked and wanted[name] is not None:
                outputs[name] = outputs[name][chosen[name]]
        return outputs

    def chunks(self, name: str, entry: Entry, wanted: Sequence[int]) -> Iterator[tuple[int, bytes | None]]:
        """(number, bytes) of chunks of an array, not looked into; `None` for a missing one."""
        values = fetch(self._kv, (chunk_key(name, entry, chunk) for chunk in wanted))
        return zip(wanted, values, strict=True)

    def value(self, key: str) -> bytes | None:
        """The value of one database key, `None` if missing."""
        return next(fetch(self._kv, [key]))

    def _content(self, key: str, size: int | None = None) -> bytes:
        with plain_errors(self.path, f"reading {key}"):
            return self._whole(key, self.value(key), size)

    def _whole(self, key: str, value: bytes | None, size: int | None) -> bytes:
        if value is None or (size is not None and len(value) != size):
            expected = None if size is None else f"{size} bytes"
            raise self._damaged(key, expected, "nothing" if value is None else f"{len(value)} bytes")
        return value

    def _damaged(self, key: str, expected: str | None, got: str) -> UserError:
        return UserError(
            "the store is damaged, or was compacted since it was opened",
            where=f"{self.path}, {key}",
            expected=expected,
            got=got,
            fix="open it again; if that does not help, `Store.verify` names what is damaged in each version",
        )


def choose_rows(name: str, entry: Entry, rows: Rows) -> np.ndarray:
    """Row numbers `[n]`, counted from the front."""
    size = entry.shape[0] if entry.shape else 0
    if rows is None:
        return np.arange(size)
    chosen = np.arange(size)[rows] if isinstance(rows, slice) else np.asarray(rows, np.int64).reshape(-1)
    if chosen.size and (chosen.min() < 0 or chosen.max() >= size):
        raise UserError("row out of range", where=name, expected=f"0..{size - 1}", got=str(sorted(set(chosen))[-1]))
    return chosen


def allocate(entry: Entry, rows: np.ndarray) -> np.ndarray:
    shape = (len(rows), *entry.chunk_shape) if entry.row_chunked else entry.shape
    return np.empty(shape, DTYPES[entry.dtype])


def chunk_places(entry: Entry, rows: np.ndarray, output: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """(chunk number, the bytes of `output` it fills) for all chunks that have any bytes."""
    if entry.chunk_bytes == 0 or output.size == 0:
        return []
    flat = raw(output).reshape(-1, entry.chunk_bytes)
    return list(zip(rows.tolist() if entry.row_chunked else [0], flat, strict=True))
