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
from pathways.store.records import (
    DTYPES,
    HASH_BYTES,
    PAGE_ROWS,
    Entry,
    chunk_key,
    decode_entry,
    hash_bytes,
    into_pages,
    page_key,
    parts_of,
    raw,
)
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

    def pending(self, base: View) -> dict[str, Entry | None] | None:
        """What an uncommitted state changes of `base`: its new index entries, `None` for a name that goes.

        `None` where this is not a state on top of `base`. All writes of a commit are under these names, so that
        whatever stands under another name is what it was.
        """
        return dict(self._pending) if self._base is not None and self._base is base else None

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

    def row_digests(self, name: str, rows: Rows = None) -> list[str]:
        """The content hash of each row (or of those asked for) of a row-chunked array, 32 hex digits each."""
        entry = self.entry(name, "array")
        if not entry.row_chunked:
            raise UserError("this array has one chunk in all, so its rows have no digests", where=name)
        if rows is None:
            return [part.hex() for part in self.row_hashes(name, entry)]
        wanted = choose_rows(name, entry, rows).tolist()
        pages = self.hash_pages(name, entry, sorted({row // PAGE_ROWS for row in wanted}))
        known = {page: parts_of(data) for page, data in pages.items()}
        return [known[row // PAGE_ROWS][row % PAGE_ROWS].hex() for row in wanted]

    def row_hashes(self, name: str, entry: Entry) -> list[bytes]:
        """The hash of every row."""
        if not entry.paged:
            return parts_of(self._content(f"hashes/{name}", entry.shape[0] * HASH_BYTES))
        return parts_of(b"".join(self.hash_pages(name, entry, range(entry.num_pages)).values()))

    def page_hashes(self, name: str, entry: Entry) -> list[bytes]:
        """The hash of every page of hashes. Pages with equal ones hold equal rows."""
        if not entry.paged:
            return [hash_bytes(page) for page in into_pages(self.row_hashes(name, entry)).values()]
        return parts_of(self._content(f"hashes/{name}", entry.num_pages * HASH_BYTES))

    def hash_pages(self, name: str, entry: Entry, pages: Sequence[int]) -> dict[int, bytes]:
        """Pages of hashes by number; those past the end are left out."""
        if not entry.paged:
            known = into_pages(self.row_hashes(name, entry))
            return {page: known[page] for page in pages if page in known}
        wanted = [page for page in pages if page < entry.num_pages]
        keys = [page_key(name, page) for page in wanted]
        with plain_errors(self.path, f"reading hashes of {name}"):
            found = list(fetch(self._kv, keys))
        sizes = [min(PAGE_ROWS, entry.shape[0] - page * PAGE_ROWS) * HASH_BYTES for page in wanted]
        checked = (self._whole(key, data, size) for key, data, size in zip(keys, found, sizes, strict=True))
        return dict(zip(wanted, checked, strict=True))

    def document(self, name: str) -> Any:
        return json.loads(self.encoded(name, self.entry(name, "document")))

    def documents(self, names: Iterable[str]) -> list[Any]:
        """Several documents at once, in order: ten thousand one by one would take seconds."""
        names = list(names)
        entries = [
            found if found is not None and found.kind == "document" else self.entry(name, "document")
            for name, found in zip(names, self.find(names), strict=True)
        ]
        keys = [f"documents/{name}" for name in names]
        with plain_errors(self.path, "reading documents"):
            values = fetch(self._kv, keys)
            return [
                json.loads(self._unchanged(key, entry, data))
                for key, entry, data in zip(keys, entries, values, strict=True)
            ]

    def blob(self, name: str) -> bytes:
        return self.encoded(name, self.entry(name, "blob"))

    def encoded(self, name: str, entry: Entry) -> bytes:
        """The bytes of a document or blob, checked against its digest."""
        key = f"{entry.kind}s/{name}"
        return self._unchanged(key, entry, self._content(key))

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

    def _unchanged(self, key: str, entry: Entry, value: bytes | None) -> bytes:
        data = self._whole(key, value, None)
        if hash_bytes(data).hex() != entry.digest:
            raise self._damaged(key, f"content of digest {entry.digest}", f"{len(data)} bytes of another")
        return data

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
