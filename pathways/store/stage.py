"""Staging: turning `Changes` into the writes of one transaction, each chunk written only if its hash differs.

Nothing reaches the disk before the transaction commits; an error before that leaves the store as it was.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tensorstore as ts

from pathways.store.records import (
    HASH_BYTES,
    PAGE_ROWS,
    Changes,
    Entry,
    array_entry,
    canonical,
    check_name,
    chunk_key,
    content_keys,
    encode_entry,
    encode_json,
    hash_bytes,
    into_pages,
    page_key,
    parts_of,
    raw,
    zarr_metadata,
)
from pathways.store.view import View
from tasks.errors import UserError

Payload = Callable[[Sequence[int]], Iterable[tuple[int, "bytes | np.ndarray"]]]
"""Gives (chunk number, bytes) for the chunk numbers asked of it; what lies in memory as a view, `[bytes]` uint8."""

REFERENCED = 1 << 16
"""Bytes from which a chunk in memory is written from where it lies. Smaller ones are cheaper to copy."""

HASH_THREADS = min(8, os.cpu_count() or 1)


class Stage:
    """The changes of one transaction on top of `view`.

    Attributes:
        transaction: commit or abort it.
        view: what the store will hold, readable before the commit.
        written, appended, removed: names touched so far.
        size: bytes of content staged.
    """

    def __init__(self, base: View, kv: ts.KvStore) -> None:
        self.transaction = ts.Transaction(atomic=True)
        self._database = kv
        self._kv = kv.with_transaction(self.transaction)
        self._base = base
        self._known: dict[str, Entry | None] = {}
        self._pending: dict[str, Entry | None] = {}
        self.view = View(base.path, self._kv, base, self._pending)
        self.written: set[str] = set()
        self.appended: set[str] = set()
        self.removed: set[str] = set()
        self.size = 0

    def apply(self, changes: Changes, row_chunked: Callable[[str], bool]) -> None:
        """Stages everything in `changes`."""
        self.know([*changes.put, *changes.documents, *changes.blobs])
        for name in changes.remove:
            self.remove(name)
        for name, array in changes.put.items():
            self.put(name, array, row_chunked(name))
        for name, (rows, values) in changes.put_rows.items():
            self.put_rows(name, rows, values)
        for name, values in changes.append.items():
            self.append(name, values)
        for name, value in changes.documents.items():
            self.value(name, "document", encode_json(value, name))
        for name, data in changes.blobs.items():
            self.value(name, "blob", bytes(data))

    def know(self, names: Iterable[str]) -> None:
        """Reads the index entries that stand under `names` in one go: one by one, ten thousand would take seconds."""
        names = list(names)
        self._known.update(zip(names, self._base.find(names), strict=True))

    def commit_part(self) -> Stage:
        """Commits what is staged and gives a stage that goes on from there; for a database nobody reads yet."""
        self.transaction.commit_async().result()
        following = Stage(self._base, self._database)
        following._known = self._known | self._pending
        return following

    def write(self, key: str, value: bytes | None, if_equal: bytes | None = None) -> None:
        """One raw key; `None` deletes it."""
        self._kv.write(key, value, if_equal=if_equal)

    def remove(self, name: str) -> None:
        """A name, or every name under a prefix that ends in `/`."""
        if name.endswith("/"):
            names = self.view.names(name)
        else:
            self.view.entry(name)
            names = [name]
        for found, entry in zip(names, self.view.find(names), strict=True):
            if entry is not None:
                for key in [*content_keys(found, entry), f"index/{found}"]:
                    self.write(key, None)
                self._pending[found] = None
                self.removed.add(found)

    def put(self, name: str, array: Any, row_chunked: bool) -> None:
        """A whole array."""
        array, dtype = canonical(name, array)
        if row_chunked and array.ndim == 0:
            raise UserError("a scalar has no rows to chunk by", where=name)
        chunks = split(array, row_chunked)
        hashes = hash_all(chunks)
        pages = into_pages(hashes) if row_chunked else {}
        tops = [hash_bytes(page) for page in pages.values()]
        entry = array_entry(array.shape, dtype, row_chunked, tops if row_chunked else hashes)
        self._array(name, entry, tops, pages, lambda wanted: ((i, chunks[i]) for i in wanted))

    def put_rows(self, name: str, rows: Any, values: Any) -> None:
        """Some rows of a row-chunked array."""
        old, array = self._rows_of(name, values)
        rows = np.asarray(rows, np.int64).reshape(-1)
        if len(rows) != len(array) or len(set(rows.tolist())) != len(rows):
            raise UserError(
                "row numbers must be distinct, one per row given",
                where=name,
                expected=f"{len(array)} distinct numbers",
                got=f"{len(rows)} numbers, {len(set(rows.tolist()))} distinct",
            )
        if rows.size and (rows.min() < 0 or rows.max() >= old.shape[0]):
            raise UserError("row out of range", where=name, expected=f"0..{old.shape[0] - 1}", got=str(rows.max()))
        self._splice(name, old, old.shape[0], dict(zip(rows.tolist(), split(array, True), strict=True)))

    def append(self, name: str, values: Any) -> None:
        """New rows at the end of a row-chunked array."""
        old, array = self._rows_of(name, values)
        start = old.shape[0]
        self._splice(name, old, start + len(array), dict(enumerate(split(array, True), start)))
        self.appended.add(name)

    def value(self, name: str, kind: Any, data: bytes) -> None:
        """A document or a blob, encoded."""
        entry = Entry(kind, hash_bytes(data).hex())
        if self._takes_place(name, entry):
            self.write(f"{kind}s/{name}", data)
            self._index(name, entry, len(data))

    def keep_only(self, source: View) -> dict[str, Entry]:
        """Removes every name that `source` does not have; gives the index entries of those that it has."""
        names = source.names()
        self.know(names)
        for name in sorted(set(self.view.names()) - set(names)):
            self.remove(name)
        return {name: entry for name, entry in zip(names, source.find(names), strict=True) if entry is not None}

    def copy(self, name: str, entry: Entry, source: View) -> None:
        """Makes `name` what it is in `source`, where its index entry is `entry`.

        Chunks that are equal here already are neither read nor written.
        """
        if entry.kind != "array":
            if self._standing(name) != entry:
                self.value(name, entry.kind, source.encoded(name, entry))
            return
        pages = into_pages(source.row_hashes(name, entry)) if entry.row_chunked else {}
        tops = [hash_bytes(page) for page in pages.values()]
        if entry.row_chunked and not entry.paged:
            entry = array_entry(entry.shape, entry.dtype, True, tops)

        def payload(wanted: Sequence[int]) -> Iterator[tuple[int, bytes]]:
            for chunk, data in source.chunks(name, entry, wanted):
                if data is None:
                    raise UserError("a chunk is missing", where=f"{source.path}, {name}, chunk {chunk}")
                yield chunk, data

        self._array(name, entry, tops, pages, payload)

    def _rows_of(self, name: str, values: Any) -> tuple[Entry, np.ndarray]:
        old = self.view.entry(name, "array")
        if not old.row_chunked:
            raise UserError("this array is not stored row by row", where=name, fix="put it whole")
        array, dtype = canonical(name, values)
        if dtype != old.dtype or array.shape[1:] != old.shape[1:] or array.ndim != len(old.shape):
            raise UserError(
                "rows do not fit the array",
                where=name,
                expected=f"[n, {', '.join(map(str, old.shape[1:]))}] {old.dtype}",
                got=f"{list(array.shape)} {dtype}",
            )
        return old, array

    def _splice(self, name: str, old: Entry, size: int, new: dict[int, np.ndarray]) -> None:
        """Row chunks `new` by number, in an array that then has `size` rows."""
        hashes = dict(zip(new, hash_all(list(new.values())), strict=True))
        touched = range(-(-size // PAGE_ROWS)) if not old.paged else sorted({row // PAGE_ROWS for row in new})
        known = self.view.hash_pages(name, old, touched)
        pages = {page: bytearray(known.get(page, b"")) for page in touched}
        for row, found in sorted(hashes.items()):
            at = row % PAGE_ROWS * HASH_BYTES
            pages[row // PAGE_ROWS][at : at + HASH_BYTES] = found
        tops = self.view.page_hashes(name, old)
        tops += [b""] * (-(-size // PAGE_ROWS) - len(tops))
        for page, data in pages.items():
            tops[page] = hash_bytes(data)
        entry = array_entry((size, *old.shape[1:]), old.dtype, True, tops)
        whole = {page: bytes(data) for page, data in pages.items()}
        self._array(name, entry, tops, whole, lambda wanted: ((i, new[i]) for i in wanted))

    def _array(
        self, name: str, entry: Entry, tops: Sequence[bytes], pages: Mapping[int, bytes], payload: Payload
    ) -> None:
        """Writes the chunks whose hash differs from what stands there, then hashes, metadata and index entry.

        Args:
            tops: the hash of every page of hashes; none for an array in one chunk.
            pages: those in which a row may differ from what stands there.
        """
        old = self._standing(name)
        if not self._takes_place(name, entry):
            return
        known: dict[int, bytes] = {}
        alike = old is not None and entry.same_layout(old)
        if old is not None and alike and entry.row_chunked:
            known = self.view.hash_pages(name, old, list(pages))
        wanted = differing(known, pages) if entry.row_chunked else [0]
        size = self._chunks(name, entry, payload(wanted if entry.num_chunks else []))
        grown = old is not None and alike and old.paged == entry.paged and entry.shape[0] >= old.shape[0]
        if old is not None and old.kind == "array" and not (entry.row_chunked and grown):
            for key in set(content_keys(name, old)) - set(content_keys(name, entry)):
                self.write(key, None)
        if entry.row_chunked:
            paged = old is not None and old.paged
            for page, data in pages.items():
                if not paged or known.get(page) != data:
                    self.write(page_key(name, page), data)
            self.write(f"hashes/{name}", b"".join(tops))
        if old is None or (old.shape, old.dtype, old.row_chunked) != (entry.shape, entry.dtype, entry.row_chunked):
            self.write(f"arrays/{name}/zarr.json", encode_json(zarr_metadata(entry)))
        self._index(name, entry, size)

    def _chunks(self, name: str, entry: Entry, given: Iterable[tuple[int, bytes | np.ndarray]]) -> int:
        """Writes chunks and gives their bytes.

        A key's value is copied twice on its way to the disk, in pieces of 4 KiB; a Zarr array takes it from where it
        lies. So large chunks in memory are written as a Zarr array of bytes, to the same keys.
        """
        size, array = 0, None
        for chunk, data in given:
            size += len(data)
            if isinstance(data, bytes) or len(data) < REFERENCED:
                self.write(chunk_key(name, entry, chunk), bytes(data))
                continue
            array = array or self._as_bytes(name, entry)
            place = array[chunk] if entry.row_chunked else array
            # The data stays as it is until the commit, which the caller waits for.
            place.write(data.reshape(place.shape), can_reference_source_data_indefinitely=True).copy.result()
        return size

    def _as_bytes(self, name: str, entry: Entry) -> ts.TensorStore:
        """The chunks of an array, as bytes of a Zarr array, in this transaction; its own metadata are not touched."""
        chunk = [entry.chunk_bytes, *[1] * (len(entry.chunk_shape) - 1)]
        rows, one = ([entry.shape[0]], [1]) if entry.row_chunked else ([], [])
        metadata = {
            "shape": rows + chunk,
            "data_type": "uint8",
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": one + chunk}},
            "codecs": [{"name": "bytes"}],
        }
        spec = {
            "driver": "zarr3",
            "metadata": metadata,
            "store_data_equal_to_fill_value": True,
            "cache_pool": {"total_bytes_limit": 0},
        }
        place = self._database / f"arrays/{name}/"
        return ts.open(spec, kvstore=place, transaction=self.transaction, open=True, assume_metadata=True).result()

    def _standing(self, name: str) -> Entry | None:
        """What the store would hold under `name` if it were committed now."""
        if name in self._pending:
            return self._pending[name]
        if name not in self._known:
            self.know([name])
        return self._known[name]

    def _takes_place(self, name: str, entry: Entry) -> bool:
        """Whether `entry` is news under its name. A name keeps its kind until it is removed."""
        old = self._standing(check_name(name))
        if old is not None and old.kind != entry.kind:
            raise UserError("this name is taken by another kind", where=name, expected=f"a {old.kind}", got=entry.kind)
        return old != entry

    def _index(self, name: str, entry: Entry, size: int) -> None:
        self.write(f"index/{name}", encode_entry(entry))
        self._pending[name] = entry
        self.written.add(name)
        self.size += size


def differing(known: Mapping[int, bytes], pages: Mapping[int, bytes]) -> list[int]:
    """The rows of `pages` whose hash is not the one in `known`."""
    found = []
    for page, data in pages.items():
        old = parts_of(known.get(page, b""))
        new = parts_of(data)
        found += [page * PAGE_ROWS + i for i, hash in enumerate(new) if i >= len(old) or old[i] != hash]
    return found


def split(array: np.ndarray, row_chunked: bool) -> list[np.ndarray]:
    """The bytes of each chunk of a contiguous array, as views."""
    if not row_chunked:
        return [raw(array)]
    return list(raw(array).reshape(array.shape[0], -1)) if array.size else [raw(array)] * array.shape[0]


def hash_all(chunks: Sequence[np.ndarray]) -> list[bytes]:
    """The hash of each chunk; several threads where there is enough to hash."""
    if sum(chunk.nbytes for chunk in chunks) < 1 << 20 or HASH_THREADS == 1:
        return [hash_bytes(chunk) for chunk in chunks]
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        return list(pool.map(hash_bytes, chunks))
