"""Where a store lives: paths and URLs, opening the database, the lock of local stores, errors in plain words."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import tensorstore as ts

from tasks.errors import UserError

try:
    import fcntl
except ImportError:  # no such lock there: the conditional write on `head` alone keeps commits apart
    fcntl = None

CONFIG = {"max_inline_value_bytes": 1024, "max_decoded_node_bytes": 1 << 13}
"""Values up to 1 KiB stand inside B+tree nodes. A commit rewrites each node on the way to what it changes, about forty
for a task: with nodes of 8 KiB that is 70 KB more among 4,000 tasks than among 10, with nodes of 64 KiB 500 KB."""

NODE_CACHE_BYTES = 128 << 20

_STATUS = re.compile(r"^[A-Z_]+: |\[tensorstore_spec=|tensorstore")
_FULL = re.compile(r"No space left|File too large|[Qq]uota exceeded|RESOURCE_EXHAUSTED|ENOSPC|EFBIG|EDQUOT")
_REPLACED = re.compile(r"Configuration mismatch on uuid|Version where .* not present|NOT_FOUND: .*/d/[0-9a-f]{32}")
_DENIED = re.compile(r"PERMISSION_DENIED|Permission denied|Read-only file system|not permitted|EROFS|EACCES|UNAUTHEN")

# One context holds what `memory://` stores contain, so that every Store of this process sees the same memory.
_MEMORY = ts.Context()


def kvstore_spec(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The tensorstore spec of the folder that holds a store.

    Args:
        path: a local path, or a URL: `file://`, `gs://bucket/path`, `s3://bucket/path`, `memory://name`.

    Raises:
        UserError: for any other scheme, or a bucket URL without a bucket.
    """
    text = os.fspath(path)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return {"driver": "file", "path": folder_key(Path(text).expanduser())}
    rest = rest.rstrip("/")
    if scheme == "file":
        return {"driver": "file", "path": folder_key(Path("/" + rest.lstrip("/")))}
    if scheme == "memory":
        return {"driver": "memory", "path": rest + "/"}
    if scheme in ("gs", "s3"):
        bucket, _, inside = rest.partition("/")
        if not bucket:
            raise UserError("the URL names no bucket", where=text, expected=f"{scheme}://bucket/path")
        return {"driver": {"gs": "gcs", "s3": "s3"}[scheme], "bucket": bucket, "path": inside and inside + "/"}
    raise UserError(
        "a store cannot live at this kind of URL",
        where=text,
        expected="a local path, file://, gs://, s3:// or memory://",
        got=f"{scheme}://",
    )


def folder_key(folder: Path) -> str:
    return str(folder.resolve()).rstrip("/") + "/"


def local_folder(path: str | os.PathLike[str]) -> Path | None:
    """The folder of a local store, `None` for a remote one."""
    spec = kvstore_spec(path)
    return Path(spec["path"]) if spec["driver"] == "file" else None


def new_context() -> ts.Context:
    """A context with a node cache of its own; `memory://` content is shared by the process."""
    return ts.Context({"cache_pool": {"total_bytes_limit": NODE_CACHE_BYTES}}, _MEMORY)


@dataclass(frozen=True)
class Database:
    """The OCDBT database at a path.

    `uuid` is its identity: compaction in place makes another database at the same path, whose generation numbers mean
    other things, and what was opened before must then fail rather than read those.
    """

    path: str
    context: ts.Context
    uuid: str | None = None

    @classmethod
    def find(cls, path: str | os.PathLike[str]) -> Database:
        """The database that exists at `path`, identified. Raises UserError if there is none."""
        new = cls(os.fspath(path), new_context())
        manifest = new.manifest()
        if manifest is None:
            raise not_a_store(path)
        return replace(new, uuid=manifest["config"]["uuid"])

    def base(self) -> ts.KvStore:
        return ts.KvStore.open(kvstore_spec(self.path), context=self.context).result()

    def at(self, generation: int | None = None) -> ts.KvStore:
        """One generation, read-only; or the newest, which is made if there is no database."""
        config = CONFIG if self.uuid is None else {"uuid": self.uuid}
        spec: dict[str, Any] = {"driver": "ocdbt", "base": kvstore_spec(self.path), "config": config}
        spec |= {} if generation is None else {"version": generation}
        return ts.KvStore.open(spec, context=self.context).result()

    def readable(self) -> ts.KvStore:
        """The newest state, or, where that is damaged, the newest generation whose head can still be read."""
        newest = self.at()
        try:
            newest.read("head").result()
            return newest
        except ValueError:
            for generation in range(self.next_generation() - 1, 0, -1):
                older = self.at(generation)
                with suppress(ValueError):
                    older.read("head").result()
                    return older
            raise

    def manifest(self) -> Any:
        """What OCDBT says of itself, `None` where there is no database."""
        base = self.base()
        return ts.ocdbt.dump(base).result() if base.read("manifest.ocdbt").result().value else None

    def next_generation(self) -> int:
        """The generation that the next commit makes; a new database starts with an empty generation 1."""
        manifest = self.manifest()
        versions = manifest["versions"] if manifest else []
        return 1 + max((version["generation_number"] for version in versions), default=1)


@contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[None]:
    """Holds the one lock of a local store, waiting for it; remote stores have none."""
    folder = local_folder(path)
    if folder is None or fcntl is None:
        yield
        return
    with plain_errors(path, "taking the lock of the store"):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def plain_errors(path: str | os.PathLike[str], doing: str) -> Iterator[None]:
    """Turns what tensorstore and the system raise into a `UserError` that says what failed and what still stands."""
    try:
        yield
    except (ValueError, OSError, NotImplementedError, RuntimeError) as error:
        told = str(error)
        if not isinstance(error, OSError) and not _STATUS.search(told):
            raise
        where = os.fspath(path)
        if _FULL.search(told):
            raise UserError(
                f"the disk is full (or a limit was reached) while {doing}; what was committed before stands unchanged",
                where=where,
                got=told,
                fix="make room, or `Store.compact` the store, and commit again",
            ) from error
        if _DENIED.search(told):
            raise UserError(
                f"no permission while {doing}", where=where, got=told, fix="check owner, mode and credentials"
            ) from error
        if _REPLACED.search(told):
            raise UserError(
                f"the store was compacted since it was opened, or its data files are lost: failed {doing}",
                where=where,
                got=told,
                fix="open it again; if that does not help, open an older version",
            ) from error
        raise UserError(
            f"input or output failed while {doing}; what was committed before stands unchanged", where=where, got=told
        ) from error


def nearest(path: str | os.PathLike[str]) -> str | None:
    """The existing sibling whose name is most like that of a missing local path."""
    folder = local_folder(path)
    if folder is None or not folder.parent.is_dir():
        return None
    close = get_close_matches(folder.name, [entry.name for entry in folder.parent.iterdir()], n=1)
    return str(folder.parent / close[0]) if close else None


def not_a_store(path: str | os.PathLike[str]) -> UserError:
    folder = local_folder(path)
    missing = folder is not None and not folder.exists()
    close = nearest(path) if missing else None
    return UserError(
        "there is nothing at this path" if missing else "this is not a pathways store",
        where=os.fspath(path),
        expected="a folder written by `Store.create`",
        fix=f"did you mean {close}?" if close else None,
    )
