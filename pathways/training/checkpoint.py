"""Training checkpoints: the whole state of a run in a store of its own, so that resuming equals never having stopped.

Each checkpoint is a store `checkpoints/<step>`; it exists whole or not at all, and the one before it is deleted only
after it is complete.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pathways.store import Changes, Store
from pathways.training.optimizer import names
from tasks.errors import UserError

SHOWN = 5
"""Differences that an error lists."""


class Checkpoints:
    """The checkpoints of one run folder.

    Args:
        folder: made when first needed.
        fingerprint: what must be the same to resume (configuration, data); a difference is an error that says which.
    """

    def __init__(self, folder: Path, fingerprint: dict[str, Any]) -> None:
        self.folder, self.fingerprint = folder, fingerprint

    def save(self, step: int, arrays: Any, notes: dict[str, Any]) -> None:
        """Writes pytree `arrays` and JSON `notes`, then drops older checkpoints."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for stale in self.folder.glob("*.part"):
            shutil.rmtree(stale)
        part = self.folder / f"{step:09d}.part"
        store = Store.create(part)
        flat = {name: np.asarray(leaf) for name, leaf in _named(arrays)}
        documents = {"notes": json.loads(json.dumps(notes)), "fingerprint": self.fingerprint}
        store.commit(Changes(put=flat, documents=documents), f"step {step}", row_chunked=lambda name: False)
        final = self.folder / f"{step:09d}"
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
        for older in self._complete():
            if older != final:
                shutil.rmtree(older, ignore_errors=True)

    def latest(self) -> int | None:
        """The step of the newest checkpoint."""
        found = self._complete()
        return int(found[-1].name) if found else None

    def check(self) -> None:
        """Raises a UserError if there is a checkpoint of another configuration or other data."""
        if self.latest() is not None:
            self._check(Store.open(self._complete()[-1]))

    def load(self, like: Any) -> tuple[Any, dict[str, Any]]:
        """The newest checkpoint, in the structure of `like`, and its notes.

        Raises:
            UserError: the run was started with another configuration or other data.
        """
        store = Store.open(self._complete()[-1])
        self._check(store)
        leaves = _named(like)
        values = store.read_many({name: None for name, _ in leaves})
        restored = [_like(old, values[name]) for name, old in leaves]
        return jax.tree.unflatten(jax.tree.structure(like), restored), store.document("notes")

    def clear(self) -> None:
        """Removes all checkpoints, once the model is committed."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _complete(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("[0-9]*") if path.suffix != ".part")

    def _check(self, store: Store) -> None:
        refuse_differences(store.document("fingerprint"), self.fingerprint, self.folder.parent)


def refuse_differences(old: Any, new: Any, folder: Path) -> None:
    """Raises a UserError that says what differs between what a run was started with and what it is to go on with."""
    before, now = _leaves(json.loads(json.dumps(old))), _leaves(json.loads(json.dumps(new)))
    differ = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    if not differ:
        return
    more = f" and {len(differ) - SHOWN} more" if len(differ) > SHOWN else ""
    raise UserError(
        "The run in this folder was started with another configuration or other data.",
        where=str(folder),
        expected=", ".join(f"{key} = {before.get(key, 'nothing')}" for key in differ[:SHOWN]) + more,
        got=", ".join(f"{key} = {now.get(key, 'nothing')}" for key in differ[:SHOWN]) + more,
        fix="use the same configuration and data to go on, another folder, or --restart to begin again",
    )


def _leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= _leaves(item, f"{prefix}.{key}" if prefix else key)
    return found


def _named(tree: Any) -> list[tuple[str, Any]]:
    """Leaves with names of their paths. Typed keys are not among them: a step makes its key from seed and step."""
    return [("/".join(names(path)), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]


def _like(old: Any, value: np.ndarray) -> Any:
    if isinstance(old, jax.Array):
        return jnp.asarray(value, old.dtype)
    return np.asarray(value, np.asarray(old).dtype)
