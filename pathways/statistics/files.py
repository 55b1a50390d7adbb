"""Where the statistics lie: a flat set of keys with bytes, in a local folder or behind a `gs://` or `s3://` URL."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Protocol


class Files(Protocol):
    """Keys (`/` separates) and their bytes. A write is atomic: a reader sees the old bytes or the new ones."""

    def list(self, prefix: str) -> list[str]:
        """The keys that begin with `prefix`, sorted."""
        ...

    def read(self, key: str) -> bytes:
        """Raises FileNotFoundError where the key is absent."""
        ...

    def write(self, key: str, data: bytes) -> None: ...

    def delete(self, key: str) -> None:
        """Deleting an absent key is no error."""
        ...


class LocalFiles:
    """Keys as files below a folder."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def __str__(self) -> str:
        return str(self.folder)

    def list(self, prefix: str) -> list[str]:
        start = self.folder / prefix if prefix.endswith("/") else self.folder
        paths = (path for path in start.rglob("*") if path.is_file() and path.suffix != ".partial")
        keys = (path.relative_to(self.folder).as_posix() for path in paths)
        return sorted(key for key in keys if key.startswith(prefix))

    def read(self, key: str) -> bytes:
        return (self.folder / key).read_bytes()

    def write(self, key: str, data: bytes) -> None:
        path = self.folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".partial")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(partial).replace(path)
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise

    def delete(self, key: str) -> None:
        (self.folder / key).unlink(missing_ok=True)


class RemoteFiles:
    """Keys behind any URL that tensorstore opens as a key-value store."""

    def __init__(self, url: str) -> None:
        import tensorstore as ts

        self.url = url if url.endswith("/") else url + "/"
        self._store = ts.KvStore.open(self.url).result()

    def __str__(self) -> str:
        return self.url

    def list(self, prefix: str) -> list[str]:
        import tensorstore as ts

        # The last key of a prefix is not nameable, so the end of the range is the prefix with its last byte raised.
        end = prefix[:-1] + chr(ord(prefix[-1]) + 1) if prefix else ""
        return sorted(key.decode() for key in self._store.list(ts.KvStore.KeyRange(prefix, end)).result())

    def read(self, key: str) -> bytes:
        found = self._store.read(key).result()
        if found.state != "value":
            raise FileNotFoundError(f"{self.url}{key}")
        return found.value

    def write(self, key: str, data: bytes) -> None:
        self._store.write(key, data).result()

    def delete(self, key: str) -> None:
        self._store.write(key, None).result()


def open_files(location: str | Path | Files) -> Files:
    """A folder, a URL, or anything that already is `Files`."""
    if isinstance(location, Path):
        return LocalFiles(location)
    if isinstance(location, str):
        return RemoteFiles(location) if "://" in location else LocalFiles(location)
    return location
