"""The model on disk: named arrays, JSON documents and blobs, versioned and committed all or nothing.

Light to import: tensorstore is loaded when a name below is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathways.store.compact import Compaction
    from pathways.store.locate import kvstore_spec
    from pathways.store.records import Changes, Version
    from pathways.store.store import Store
    from pathways.store.view import View

__all__ = ["Changes", "Compaction", "Store", "Version", "View", "kvstore_spec"]

_HOME = {
    "Changes": "records",
    "Compaction": "compact",
    "Store": "store",
    "Version": "records",
    "View": "view",
    "kvstore_spec": "locate",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
