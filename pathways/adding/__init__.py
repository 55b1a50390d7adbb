"""Adding a task to a model, taking one away, going back. See docs/adding.md for how it works and what is promised.

Light to import: jax and the store are loaded when a name below is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathways.adding.add import add_task
    from pathways.adding.remove import remove_task, undo
    from pathways.adding.request import plan_task

__all__ = ["add_task", "plan_task", "remove_task", "undo"]

_HOME = {"add_task": "add", "plan_task": "request", "remove_task": "remove", "undo": "remove"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
