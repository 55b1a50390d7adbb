"""The life of a task after it was added: what it costs, who uses what, copies, names, versions. See docs/life.md.

Light to import: jax and the store are loaded when a name below is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathways.life.ancestry import Lineage, lineage
    from pathways.life.cost import Marginal, marginal
    from pathways.life.difference import Difference, diff
    from pathways.life.garbage import collect
    from pathways.life.names import copy_task, rename_task
    from pathways.life.removal import Removal, plan_removal
    from pathways.life.update import update_task
    from pathways.life.users import Use, who_uses

__all__ = [
    "Difference",
    "Lineage",
    "Marginal",
    "Removal",
    "Use",
    "collect",
    "copy_task",
    "diff",
    "lineage",
    "marginal",
    "plan_removal",
    "rename_task",
    "update_task",
    "who_uses",
]

_HOME = {
    "Difference": "difference",
    "Lineage": "ancestry",
    "Marginal": "cost",
    "Removal": "removal",
    "Use": "users",
    "collect": "garbage",
    "copy_task": "names",
    "diff": "difference",
    "lineage": "ancestry",
    "marginal": "cost",
    "plan_removal": "removal",
    "rename_task": "names",
    "update_task": "update",
    "who_uses": "users",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
