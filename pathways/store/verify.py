"""Recomputing digests: what is damaged in a version, by name and row."""

from __future__ import annotations

from pathways.store.records import Entry, array_digest, hash_bytes, into_pages
from pathways.store.view import View
from tasks.errors import UserError


def damaged(view: View) -> list[str]:
    """The names (`name` or `name[row]`) whose stored content is not what was committed.

    Reads everything once, a window of chunks at a time. Content that cannot be read counts as damaged.
    """
    names = view.names()
    found: list[str] = []
    for name, entry in zip(names, view.find(names), strict=True):
        if entry is None:
            found.append(name)
        elif entry.kind == "array":
            found += damaged_array(view, name, entry)
        else:
            found += damaged_value(view, name, entry)
    return found


def damaged_value(view: View, name: str, entry: Entry) -> list[str]:
    try:
        data = view.value(f"{entry.kind}s/{name}")
    except ValueError:
        data = None
    return [] if data is not None and hash_bytes(data).hex() == entry.digest else [name]


def damaged_array(view: View, name: str, entry: Entry) -> list[str]:
    """Row-chunked: first the recorded hashes against the digest, then each row against its hash."""
    if entry.row_chunked:
        try:
            recorded = view.row_hashes(name, entry)
        except (UserError, ValueError):
            return [name]
        hashed = [hash_bytes(page) for page in into_pages(recorded).values()] if entry.paged else recorded
        if array_digest(entry.dtype, entry.shape, True, hashed, entry.paged) != entry.digest:
            return [name]
        if entry.paged and not same_pages(view, name, entry, hashed):
            return [name]
        return [f"{name}[{i}]" for i in range(entry.num_chunks) if chunk_hash(view, name, entry, i) != recorded[i]]
    only = chunk_hash(view, name, entry, 0) if entry.num_chunks else hash_bytes(b"")
    whole = only is not None and array_digest(entry.dtype, entry.shape, False, [only]) == entry.digest
    return [] if whole else [name]


def same_pages(view: View, name: str, entry: Entry, hashed: list[bytes]) -> bool:
    """Whether the recorded hashes of the pages are theirs."""
    try:
        return view.page_hashes(name, entry) == hashed
    except UserError:
        return False


def chunk_hash(view: View, name: str, entry: Entry, chunk: int) -> bytes | None:
    try:
        data = next(iter(view.chunks(name, entry, [chunk])))[1]
    except ValueError:
        return None
    return hash_bytes(data) if data is not None and len(data) == entry.chunk_bytes else None
