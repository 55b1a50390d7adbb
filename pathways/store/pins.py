"""Pins: names for versions. They stand beside the versions, so that going back to an older one keeps them.

One key, `pins`, holds all: `{name: number}`. Compaction keeps every version that has one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

import tensorstore as ts

from tasks.check import nearest
from tasks.errors import UserError

KEY = "pins"
_NAME = re.compile(r"[\w.\-]+")


def read_pins(database: ts.KvStore) -> dict[str, int]:
    """Name -> number of the version, by name."""
    return stamped_pins(database)[0]


def stamped_pins(database: ts.KvStore) -> tuple[dict[str, int], bytes]:
    """The same, and the storage generation of the key that holds them."""
    result = database.read(KEY).result()
    return dict(sorted(json.loads(result.value).items())) if result.value else {}, result.stamp.generation


def check_pin(path: str, name: str) -> str:
    """Returns `name` if a version can be called so: letters, digits, `_`, `-` and `.`, and not a number."""
    if not _NAME.fullmatch(name) or name.isdecimal():
        raise UserError(
            "A version cannot have this name.",
            where=path,
            got=repr(name),
            expected="letters, digits, '_', '-' and '.', and not digits alone",
        )
    return name


def pinned(path: str, pins: Mapping[str, int], name: str) -> int:
    """The number of the version called so.

    Raises:
        UserError: no version is; the nearest name is suggested.
    """
    if name not in pins:
        guess = nearest(name, pins)
        raise UserError(
            "No version has this name.",
            where=path,
            expected=", ".join(pins) or "a number: no version has a name",
            got=name,
            fix=f"did you mean {guess!r}?" if guess else "`pathways log` lists the versions",
        )
    return pins[name]
