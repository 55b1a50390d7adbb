"""Files as bytes and lines: globs, gzip, encodings, and errors that say which file and which line."""

from __future__ import annotations

import codecs
import glob
import gzip
import hashlib
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from tasks.check import listing, nearest
from tasks.errors import UserError
from tasks.spec import OnBad

HEAD = 1 << 16


@dataclass
class Request:
    """What a format module is asked to read, and its count of rows skipped."""

    path: str
    rows_per_batch: int = 4096
    on_bad: OnBad = "stop"
    encoding: str | None = None
    skipped: int = 0

    def bad(self, error: UserError) -> None:
        """Raises `error`, or counts one skipped row, as `on_bad` says."""
        if self.on_bad == "stop":
            raise error
        self.skipped += 1


def find(path: str) -> list[str]:
    """The sorted files (or the one folder) that `path`, maybe a glob, means; never empty."""
    if Path(path).exists():
        return [path]
    if any(letter in path for letter in "*?["):
        found = sorted(glob.glob(path, recursive=True))  # noqa: PTH207, patterns may be absolute
        if found:
            return found
        raise UserError("no file matches the pattern", where=path)
    folder = Path(path).parent
    if not folder.is_dir():
        raise UserError("the folder of this file does not exist", where=path, expected=f"a folder {folder}")
    names = sorted(entry.name for entry in folder.iterdir())
    guess = nearest(Path(path).name, names)
    raise UserError(
        "this file does not exist",
        where=path,
        got=f"a folder with {listing(names, 8)}" if names else "an empty folder",
        fix=f"did you mean {str(folder / guess)!r}?" if guess else None,
    )


def bare_name(path: str) -> str:
    """The file's name in lower case without `.gz`."""
    return Path(path).name.lower().removesuffix(".gz")


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Turns what goes wrong with the bytes of `path` into a UserError."""
    try:
        yield
    except EOFError as error:
        raise UserError(
            "the compressed file ends too early", where=path, got=str(error), fix="copy or download it again"
        ) from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(
            "the file is not valid gzip, or it is damaged",
            where=path,
            got=str(error),
            fix="copy it again, or drop the ending .gz if it is not compressed",
        ) from error
    except OSError as error:
        raise UserError("the file cannot be read", where=path, got=error.strerror or str(error)) from error


def open_bytes(path: str) -> BinaryIO:
    """Opens for reading, decompressing `.gz`; an empty file is a UserError."""
    if Path(path).is_file() and Path(path).stat().st_size == 0:
        raise UserError("the file is empty", where=path, got="0 bytes")
    with reading(path):
        return cast(BinaryIO, gzip.open(path, "rb") if path.endswith(".gz") else Path(path).open("rb"))


def encoding_of(request: Request) -> str:
    """The encoding that was asked for, else the one the byte order mark tells, else UTF-8."""
    if request.encoding is not None:
        try:
            return codecs.lookup(request.encoding).name
        except LookupError as error:
            raise UserError(f"there is no encoding {request.encoding!r}", where=request.path) from error
    with reading(request.path), open_bytes(request.path) as file:
        head = file.read(4)
    if head.startswith(codecs.BOM_UTF8):
        return "utf-8-sig"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if b"\0" in head:
        raise UserError(
            "the file is not text, or UTF-16 without a byte order mark",
            where=request.path,
            got=f"bytes {head.hex(' ')} at its start",
            fix="if it is text, say its encoding, for example encoding = 'utf-16-le'",
        )
    return "utf-8"


def lines(request: Request) -> Iterator[tuple[int, str]]:
    """Yields (line number from 1, line with its ending); a byte that does not decode is a UserError."""
    path, encoding = request.path, encoding_of(request)
    with reading(path), open_bytes(path) as file:
        if encoding not in ("utf-8", "utf-8-sig"):
            yield from _transcoded(path, encoding, file)
            return
        offset = 0
        for number, raw in enumerate(file, start=1):
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise wrong_encoding(path, number, offset + error.start, raw[error.start]) from error
            if number == 1 and encoding == "utf-8-sig":
                text = text.removeprefix("\ufeff")
            offset += len(raw)
            yield number, text


def _transcoded(path: str, encoding: str, file: BinaryIO) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        with io.TextIOWrapper(file, encoding=encoding, newline="\n") as text:
            for number, line in enumerate(text, start=1):
                yield number, line
    except UnicodeError as error:
        raise UserError(f"the file is not {encoding} text", where=f"{path}, after line {number}") from error


def wrong_encoding(path: str, line: int, offset: int, byte: int) -> UserError:
    return UserError(
        "the file is not UTF-8 text",
        where=f"{path}, line {line}, byte {offset}",
        expected="UTF-8 (or UTF-16 with a byte order mark)",
        got=f"byte 0x{byte:02x}",
        fix="say its encoding, for example encoding = 'latin-1' (--encoding latin-1), or convert it to UTF-8",
    )


def digest(path: str) -> str:
    """Size, time of last change and a hash of head and tail of a file; for a folder, of its listing."""
    with reading(path):
        if Path(path).is_dir():
            return _folder_digest(path)
        stat = Path(path).stat()
        with Path(path).open("rb") as file:
            content = hashlib.blake2b(file.read(HEAD), digest_size=16)
            file.seek(max(0, stat.st_size - HEAD))
            content.update(file.read(HEAD))
    return f"{stat.st_size}-{stat.st_mtime_ns}-{content.hexdigest()}"


def _folder_digest(path: str) -> str:
    content = hashlib.blake2b(digest_size=16)
    for folder, subfolders, names in os.walk(path):
        subfolders.sort()
        content.update(f"{folder}\0{Path(folder).stat().st_mtime_ns}\0{len(names)}\0".encode())
    return content.hexdigest()
