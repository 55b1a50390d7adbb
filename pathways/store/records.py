"""What the store writes down: names, keys, entries, digests, versions. Pure data and arithmetic, no input or output.

Keys of the OCDBT database:

    format                      {"format": "pathways-store", "version": 2}
    head                        {"number": N}: the newest version; every commit is conditional on it
    pins                        {name: number}: versions that have a name. Written with the head
    log/<number>                one `Version`, and the OCDBT generation that holds it
    index/<name>                one `Entry`: kind, shape, dtype, digest. Listing the index never touches data
    hashes/<name>               of a row-chunked array: 16 bytes per page, the hash of the page
    pages/<name>/<page>         a page: 16 bytes per row, the hash of the row, of `PAGE_ROWS` rows
    arrays/<name>/zarr.json     Zarr v3 metadata, so that any Zarr reader over OCDBT opens the array
    arrays/<name>/c/i/0/...     chunks: raw little-endian elements, row by row, or one chunk for the whole array
    documents/<name>            JSON
    blobs/<name>                bytes
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import blake2b
from typing import Any, Literal

import ml_dtypes
import numpy as np

from tasks.errors import UserError

FORMAT = "pathways-store"
FORMAT_VERSION = 2
"""Version 1 kept the hashes of all rows under `hashes/<name>`: such arrays are read, and paged when next written."""
HASH_BYTES = 16
PAGE_ROWS = 256
"""Rows whose hashes stand together: a change of one row rewrites these hashes, not those of the whole array."""
NAMES_IN_LOG = 100
"""A log entry lists at most so many names of each sort; the counts are always whole."""

_EXTENDED = {name: np.dtype(getattr(ml_dtypes, name)) for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")}
_PLAIN = "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 complex64 complex128"
DTYPES: dict[str, np.dtype] = {name: np.dtype(name) for name in _PLAIN.split()} | _EXTENDED
"""The element types a store holds, by their Zarr names."""

_NAME = re.compile(r"[\w.\-]+(/[\w.\-]+)*")

Kind = Literal["array", "document", "blob"]


@dataclass(frozen=True)
class Version:
    """One committed state.

    Attributes:
        number: 1 for the empty store, then one more with each commit; kept for ever, also by compaction.
        time: of the commit, UTC.
        message: why.
        parent: the version it was made from; `None` for the first.
        changes: `written`, `appended`, `removed` (names, at most `NAMES_IN_LOG` of each), `counts` of each, and `bytes`
            of array, document and blob content written.
        generation: the OCDBT generation that holds it.
    """

    number: int
    time: datetime
    message: str
    parent: int | None
    changes: dict[str, Any]
    generation: int = 0


@dataclass
class Changes:
    """What one commit does, all or nothing: first `remove`, then `put`, `put_rows`, `append`, documents and blobs.

    Content equal to what stands there is recognised by its digest and not written again, so a caller may put a whole
    array of which a few rows differ and pay for those.

    Attributes:
        put: whole arrays, new or replaced.
        put_rows: name -> (row numbers `[n]`, rows `[n, ...]`) of a row-chunked array.
        append: new rows at the end of a row-chunked array.
        documents: anything `json` can write; NaN and infinities are refused, as JSON has none.
        blobs: bytes.
        remove: names, or prefixes ending in `/`. A name that does not exist is an error, an empty prefix is not.
    """

    put: dict[str, np.ndarray] = field(default_factory=dict)
    put_rows: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    append: dict[str, np.ndarray] = field(default_factory=dict)
    documents: dict[str, Any] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    remove: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Entry:
    """One name in the index. `shape`, `dtype`, `row_chunked` and `paged` belong to arrays.

    `paged`: the hashes of the rows stand in pages, and the digest is made from those of the pages.
    """

    kind: Kind
    digest: str
    shape: tuple[int, ...] = ()
    dtype: str = ""
    row_chunked: bool = False
    paged: bool = False

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        return self.shape[1:] if self.row_chunked else self.shape

    @property
    def chunk_bytes(self) -> int:
        return math.prod(self.chunk_shape) * DTYPES[self.dtype].itemsize

    @property
    def num_chunks(self) -> int:
        """Chunks that exist as keys; none where a chunk would be empty."""
        return 0 if self.chunk_bytes == 0 else (self.shape[0] if self.row_chunked else 1)

    @property
    def num_pages(self) -> int:
        """Pages of hashes."""
        return -(-self.shape[0] // PAGE_ROWS) if self.paged else 0

    def same_layout(self, other: Entry | None) -> bool:
        """Whether chunk `i` of one may stand for chunk `i` of the other."""
        return other is not None and (self.kind, self.dtype, self.row_chunked, self.chunk_shape) == (
            other.kind,
            other.dtype,
            other.row_chunked,
            other.chunk_shape,
        )


def check_name(name: str) -> str:
    """Returns `name` if it is a legal one: parts of letters, digits, `_`, `-` and `.`, joined by `/`."""
    if not _NAME.fullmatch(name) or any(part in (".", "..") for part in name.split("/")):
        raise UserError(
            "this name cannot stand in a store",
            got=repr(name),
            expected="parts of letters, digits, '_', '-' and '.', joined by single '/', none of them '.' or '..'",
        )
    return name


def hash_bytes(data: Any) -> bytes:
    """BLAKE2b of 128 bits of any contiguous buffer (RFC 7693)."""
    return blake2b(data, digest_size=HASH_BYTES).digest()


def array_digest(
    entry_dtype: str, shape: tuple[int, ...], row_chunked: bool, hashes: Iterable[bytes], paged: bool = False
) -> str:
    """The digest of an array: of its type, shape, chunking and hashes, those of its pages or else of its chunks."""
    head = json.dumps([entry_dtype, list(shape), f"pages of {PAGE_ROWS}" if paged else row_chunked]).encode()
    return hash_bytes(head + b"".join(hashes)).hex()


def array_entry(shape: tuple[int, ...], dtype: str, row_chunked: bool, hashes: Iterable[bytes]) -> Entry:
    """An entry as it is written: with pages where there is one chunk per row.

    Args:
        hashes: of the pages, or of the one chunk.
    """
    digest = array_digest(dtype, shape, row_chunked, hashes, paged=row_chunked)
    return Entry("array", digest, tuple(shape), dtype, row_chunked, paged=row_chunked)


def into_pages(hashes: Sequence[bytes]) -> dict[int, bytes]:
    """The pages of all rows' hashes, by number."""
    starts = range(0, len(hashes), PAGE_ROWS)
    return {page: b"".join(hashes[start : start + PAGE_ROWS]) for page, start in enumerate(starts)}


def parts_of(data: bytes) -> list[bytes]:
    """The single hashes in a row of them."""
    return [data[i : i + HASH_BYTES] for i in range(0, len(data), HASH_BYTES)]


def canonical(name: str, array: Any) -> tuple[np.ndarray, str]:
    """`array` as contiguous little-endian elements, and the name of their type.

    Raises:
        UserError: for a type that a store does not hold (objects, strings, dates).
    """
    array = np.asarray(array)
    dtype = array.dtype.newbyteorder("<") if array.dtype.isbuiltin != 2 else array.dtype
    if dtype.name not in DTYPES:
        raise UserError("a store does not hold this type", where=name, got=str(array.dtype), expected=", ".join(DTYPES))
    return np.require(array, dtype, "C"), dtype.name


def raw(array: np.ndarray) -> np.ndarray:
    """The bytes of a contiguous array, `[nbytes]` uint8, without a copy."""
    return array.reshape(-1).view(np.uint8)


def chunk_key(name: str, entry: Entry, chunk: int) -> str:
    first = [str(chunk)] if entry.row_chunked else []
    return "/".join(["arrays", name, "c", *first, *["0"] * len(entry.chunk_shape)])


def content_keys(name: str, entry: Entry) -> list[str]:
    """Every key that holds content or metadata of a name, but for its index entry."""
    if entry.kind != "array":
        return [f"{entry.kind}s/{name}"]
    keys = [f"arrays/{name}/zarr.json"] + [chunk_key(name, entry, i) for i in range(entry.num_chunks)]
    return keys + [f"hashes/{name}"] * entry.row_chunked + [page_key(name, i) for i in range(entry.num_pages)]


def page_key(name: str, page: int) -> str:
    return f"pages/{name}/{page:06d}"


def zarr_metadata(entry: Entry) -> dict[str, Any]:
    """Zarr v3 metadata of an array: no compression, little-endian, one chunk per row or one in all."""
    chunk = [1, *entry.shape[1:]] if entry.row_chunked else list(entry.shape)
    is_complex = entry.dtype.startswith("complex")
    zero = [0.0, 0.0] if is_complex else False if entry.dtype == "bool" else 0
    endian = {} if DTYPES[entry.dtype].itemsize == 1 else {"configuration": {"endian": "little"}}
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(entry.shape),
        "data_type": entry.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [max(1, size) for size in chunk]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": [{"name": "bytes", **endian}],
        "fill_value": zero,
        "attributes": {},
    }


def encode_json(value: Any, name: str = "") -> bytes:
    """UTF-8 JSON. Raises UserError for what JSON cannot hold, naming the document."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError) as error:
        raise UserError("this document cannot be written as JSON", where=name, got=str(error)) from None


def encode_entry(entry: Entry) -> bytes:
    fields: dict[str, Any] = {"kind": entry.kind, "digest": entry.digest}
    if entry.kind == "array":
        fields |= {"shape": entry.shape, "dtype": entry.dtype, "row_chunked": entry.row_chunked}
        fields |= {"paged": True} if entry.paged else {}
    return encode_json(fields)


def decode_entry(data: bytes) -> Entry:
    fields = json.loads(data)
    return Entry(**{**fields, "shape": tuple(fields.get("shape", ()))})


def log_key(number: int) -> str:
    return f"log/{number:010d}"


def encode_version(version: Version) -> bytes:
    return encode_json({**vars(version), "time": version.time.isoformat()})


def decode_version(data: bytes) -> Version:
    fields = json.loads(data)
    return Version(**{**fields, "time": datetime.fromisoformat(fields["time"])})


def summary(names: Mapping[str, Iterable[str]], size: int) -> dict[str, Any]:
    """The `changes` of a `Version`."""
    whole = {sort: sorted(found) for sort, found in names.items()}
    listed = {sort: found[:NAMES_IN_LOG] for sort, found in whole.items()}
    return {**listed, "counts": {sort: len(found) for sort, found in whole.items()}, "bytes": size}
