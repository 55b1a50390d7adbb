"""A split encoded once, kept on disk as flat arrays with offsets, read through the page cache.

A folder per split, named by a hash of all that its content depends on: the fitted task, the files' fingerprints, the
tokenizer, the settings. It is written beside its place and renamed when whole, so a half-written one is never used;
two processes that write the same one both succeed.

    table.column.npy ... text.id.npy ...  image.patch.npy ...   tokens of all examples, end to end
    table.offsets.npy ...                                       [n + 1] int64, where each example's tokens begin
    y.npy  y_mask.npy  row.npy  words.npy  group.npy            one entry an example
    target.tag.npy  target.offsets.npy                          tags of all words, also of those cut off (tagging)
    meta.json                                                   format, counts, names of the groups, sizes

Axis letters: n examples, t tokens of all examples, Y outputs.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from tasks.cache_size import mark_used
from tasks.encode import encode_batch, input_columns
from tasks.encoded import EncodedRows, EncoderSettings, Example, Ragged, stored_fields, stream_order
from tasks.errors import UserError
from tasks.pack import TokenUse
from tasks.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tasks.fitted import FittedTask
    from tasks.splits import SplitName

FORMAT = 1
"""Part of every cache's name: raise it when the layout or the encoding changes."""

ROWS_AT_ONCE = 1024
"""Rows encoded together: bounds the memory of encoding, whatever the size of the file."""

READ_WHOLE = 1 << 18
"""Files of at most this many bytes are read rather than mapped."""

MANY_FILES = 1 << 16

_EXAMPLE_ARRAYS = ("y", "y_mask", "row", "words", "group")


def encode_split(
    fitted: FittedTask,
    split: SplitName,
    tokenizer: Tokenizer,
    settings: EncoderSettings,
    cache_dir: str | os.PathLike[str],
) -> EncodedSplit:
    """The encoded split, from `cache_dir` if it is there, else read from its file and kept there.

    Raises:
        UserError: a mistake in the data, data that changes meanwhile, a folder that cannot be written, a full disk.
    """
    from tasks.splits import open_split, rows

    reader = open_split(fitted.task, split, rows_per_batch=ROWS_AT_ONCE)
    key = cache_key(fitted, split, reader.fingerprint(), tokenizer, settings)
    folder = Path(cache_dir) / key
    found = _open_if_whole(folder)
    if found is None:
        group = [fitted.task.group] if fitted.task.group else []
        columns = list(dict.fromkeys([*input_columns(fitted), *fitted.task.target.columns, *group]))

        def encoded() -> Iterable[EncodedRows]:
            for batch in rows(fitted.task, split, columns=columns, rows_per_batch=ROWS_AT_ONCE, reader=reader):
                for start in range(0, batch.num_rows, ROWS_AT_ONCE):
                    yield encode_batch(fitted, tokenizer, batch.slice(start, ROWS_AT_ONCE), settings)
            reader.check_unchanged()

        write_split(folder, encoded(), settings)
    mark_used(folder)
    return found or EncodedSplit(folder)


def _open_if_whole(folder: Path) -> EncodedSplit | None:
    """The split, unless it is not there or, after a crash of the machine, damaged; then its folder is cleared away."""
    if not folder.is_dir():
        return None
    try:
        return EncodedSplit(folder)
    except UserError:
        shutil.rmtree(folder, ignore_errors=True)
        return None


def cache_key(fitted: FittedTask, split: str, fingerprint: str, tokenizer: Tokenizer, settings: EncoderSettings) -> str:
    """The name of the folder that holds this encoding and no other."""
    task = fitted.to_json()
    task["task"] = {
        name: value for name, value in task["task"].items() if name not in ("name", "weight", "loss", "metrics")
    }
    parts = [FORMAT, task, split, fingerprint, tokenizer.json, asdict(settings)]
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def write_split(folder: Path, batches: Iterable[EncodedRows], settings: EncoderSettings) -> None:
    """Writes encoded rows into `folder`, which appears whole or not at all.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder.parent))
        _write_files(temporary, batches, settings)
        try:
            temporary.rename(folder)
        except OSError:
            if not (folder / "meta.json").is_file():
                raise
    except OSError as error:
        raise UserError(
            "the encoded data cannot be kept",
            where=str(folder.parent),
            expected="a folder that can be written, with room on its disk",
            got=f"{type(error).__name__}: {error.strerror or error}",
            fix="free some room, or name another folder for the cache",
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _write_files(folder: Path, batches: Iterable[EncodedRows], settings: EncoderSettings) -> None:
    arrays: dict[str, _Growing] = {}
    counts: Counter[str] = Counter()
    unseen: Counter[str] = Counter()
    groups: dict[str, int] = {}
    streams: list[str] = []
    with ExitStack() as files:
        for rows in batches:
            if not arrays:
                streams = stream_order(set(rows.streams))
                for name, (tail, dtype) in _layout(streams, rows.y.shape[1], settings).items():
                    arrays[name] = files.enter_context(_Growing(folder / f"{name}.npy", tail, dtype))
                for stream in [*streams, "target"]:
                    arrays[f"{stream}.offsets"].append(np.zeros(1, np.int64))
            counts.update(rows.counts)
            unseen.update(rows.unseen)
            codes = [groups.setdefault(name, len(groups)) for name in rows.groups] if rows.groups else [-1] * len(rows)
            columns = (rows.y, rows.y_mask, rows.row_numbers, rows.words, codes)
            for name, values in zip(_EXAMPLE_ARRAYS, columns, strict=True):
                arrays[name].append(np.asarray(values))
            tags = rows.word_tags or [np.zeros(0, np.int32)] * len(rows)
            target = Ragged({"tag": np.concatenate([np.zeros(0, np.int32), *tags])}, np.array([len(t) for t in tags]))
            for stream, ragged in [*((stream, rows.streams[stream]) for stream in streams), ("target", target)]:
                ends = arrays[f"{stream}.offsets"].last + np.cumsum(ragged.lengths)
                arrays[f"{stream}.offsets"].append(ends)
                for name, values in ragged.fields.items():
                    arrays[f"{stream}.{name}"].append(values)
    meta = {
        "format": FORMAT,
        "examples": arrays["row"].count if arrays else 0,
        "streams": streams,
        "counts": dict(counts),
        "unseen": dict(unseen),
        "groups": list(groups),
    }
    (folder / "meta.json").write_text(json.dumps(meta))


def _layout(
    streams: list[str], outputs: int, settings: EncoderSettings
) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """File -> (shape of one entry, dtype)."""
    f32, i32, i64 = np.dtype(np.float32), np.dtype(np.int32), np.dtype(np.int64)
    layout = {"y": ((outputs,), f32), "y_mask": ((outputs,), f32), "row": ((), i64), "words": ((), i32)}
    layout |= {"group": ((), i32), "target.tag": ((), i32), "target.offsets": ((), i64)}
    for stream in streams:
        layout[f"{stream}.offsets"] = ((), i64)
        layout |= {f"{stream}.{name}": field for name, field in stored_fields(stream, settings).items()}
    return layout


class _Growing:
    """A .npy file that grows along its first axis; numpy leaves room in the header for the final count."""

    def __init__(self, path: Path, tail: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._tail, self._dtype = tail, dtype
        self.count, self.last = 0, 0
        self._file: IO[bytes] = path.open("wb")
        self._header()

    def append(self, values: np.ndarray) -> None:
        values = np.ascontiguousarray(values, self._dtype)
        assert values.shape[1:] == self._tail, (values.shape, self._tail)
        self._file.write(values.data if values.size else b"")
        self.count += len(values)
        if len(values) and not self._tail:
            self.last = values[-1]

    def __enter__(self) -> _Growing:
        return self

    def __exit__(self, *exception: object) -> None:
        """Puts the final count into the header."""
        with self._file:
            self._file.seek(0)
            self._header()

    def _header(self) -> None:
        shape = (self.count, *self._tail)
        descr = np.lib.format.dtype_to_descr(self._dtype)
        np.lib.format.write_array_header_1_0(self._file, {"descr": descr, "fortran_order": False, "shape": shape})


class EncodedSplit:
    """An encoded split opened from its folder; arrays are views of the files, nothing is read before it is used.

    Attributes:
        folder: where it is.
        streams: the streams its examples have, in order.
        counts: rows `truncated` (kept, but cut), and left out: `bad`, `bad_target`, `missing_target`.
        unseen: labels that training never had, with how often they came; their rows (of classification) are left out.
        row_numbers: `[n]` int64, the rows' numbers in their file.
        y, y_mask: `[n, Y]` float32 (Y is 0 for tagging).
        words: `[n]` int32, words of each example before any cut (tagging).
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        try:
            meta = json.loads((self.folder / "meta.json").read_text())
            self.counts: dict[str, int] = meta["counts"]
            self.unseen: dict[str, int] = meta["unseen"]
            self._groups: list[str] = meta["groups"]
            self.streams: tuple[str, ...] = tuple(meta["streams"])
            self._length: int = meta["examples"]
            empty = self._length == 0
            names = () if empty else (*_EXAMPLE_ARRAYS, "target.tag", "target.offsets")
            arrays = {name: _open(self.folder / f"{name}.npy") for name in names}
            self.fields = {stream: {} if empty else self._open_stream(stream) for stream in self.streams}
            self.offsets = {
                stream: np.zeros(1, np.int64) if empty else _open(self.folder / f"{stream}.offsets.npy")
                for stream in self.streams
            }
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                "the encoded data cannot be read",
                where=str(self.folder),
                got=f"{type(error).__name__}: {error}",
                fix="delete this folder; it is made again from the data",
            ) from error
        none = np.zeros((0, 0), np.float32)
        self.row_numbers: np.ndarray = arrays.get("row", np.zeros(0, np.int64))
        self.y: np.ndarray = arrays.get("y", none)
        self.y_mask: np.ndarray = arrays.get("y_mask", none)
        self.words: np.ndarray = arrays.get("words", np.zeros(0, np.int32))
        self._group_codes = arrays.get("group", np.zeros(0, np.int32))
        self._tags = arrays.get("target.tag", np.zeros(0, np.int32))
        self._tag_offsets = arrays.get("target.offsets", np.zeros(1, np.int64))

    def __len__(self) -> int:
        return self._length

    @property
    def groups(self) -> list[str] | None:
        """The value of the group column for each example; None when the task has no such column."""
        return [self._groups[code] for code in self._group_codes] if self._groups else None

    @property
    def lengths(self) -> np.ndarray:
        """`[n]` tokens of each example, all streams together."""
        return np.sum([np.diff(offsets) for offsets in self.offsets.values()], axis=0)

    def example(self, index: int) -> Example:
        """One example, as views."""
        if not 0 <= index < self._length:
            raise IndexError(f"example {index} of {self._length}")
        streams, lengths = {}, {}
        for stream, offsets in self.offsets.items():
            begin, end = int(offsets[index]), int(offsets[index + 1])
            if end > begin:
                streams[stream] = {name: values[begin:end] for name, values in self.fields[stream].items()}
                lengths[stream] = end - begin
        return Example(streams, lengths, self.y[index], self.y_mask[index])

    def word_tags(self, index: int) -> np.ndarray:
        """The class of each word of a tagged example, also of words cut off; -1 where the tag is unseen."""
        return self._tags[self._tag_offsets[index] : self._tag_offsets[index + 1]]

    def token_use(self) -> TokenUse:
        """What its examples need of a batch, for `tasks.pack.shape_for`."""
        lengths = {stream: np.diff(offsets) for stream, offsets in self.offsets.items()}
        return TokenUse(
            mean={stream: float(values.mean()) if len(values) else 0.0 for stream, values in lengths.items()},
            largest={stream: int(values.max(initial=0)) for stream, values in lengths.items()},
            outputs=self.y.shape[1],
        )

    def _open_stream(self, stream: str) -> dict[str, np.ndarray]:
        names = [path.name.split(".")[1] for path in sorted(self.folder.glob(f"{stream}.*.npy"))]
        return {name: _open(self.folder / f"{stream}.{name}.npy") for name in names if name != "offsets"}


def _open(path: Path) -> np.ndarray:
    """A small array read, a larger one mapped, as a plain array: slicing it is several times faster than a memmap."""
    if path.stat().st_size <= READ_WHOLE:
        return np.load(path)
    _allow_many_files()
    return np.load(path, mmap_mode="r").view(np.ndarray)


@functools.cache
def _allow_many_files() -> None:
    """Every mapped array keeps a file open, and the usual limit of 1,024 is less than some hundred tasks need."""
    try:
        import resource
    except ImportError:  # not a Unix: there is no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MANY_FILES if hard == resource.RLIM_INFINITY else min(hard, MANY_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
