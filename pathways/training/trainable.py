"""What of a network's parameters a step trains: all, some leaves, or some rows of a leaf.

What does not train is a constant of the step: no moments are kept for it, it weighs nothing in the clipped norm, and it
stays as it is, bit for bit. Axis letters: n rows that train, of a leaf `[E, ...]` or, where layers are scanned,
`[L, E, ...]`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from flax import nnx

from pathways.training.optimizer import names

Names = tuple[str, ...]


@dataclass(frozen=True)
class Trainable:
    """Which parameters train.

    Attributes:
        leaf: whether a leaf trains, by path.
        rows: of the leaves that train in part, by path: the index of the rows, `[n]` or, of scanned layers, `[L, n]`.
    """

    leaf: Callable[[Names], bool]
    rows: Mapping[Names, np.ndarray] = field(default_factory=dict)

    def split(self, params: Any) -> tuple[Any, Any]:
        """What trains, with leaves of which only some rows do cut down to those; and what `join` needs besides."""
        mine, others = nnx.split_state(params, lambda path, _: self.leaf(tuple(str(part) for part in path)), ...)
        cut = jax.tree_util.tree_map_with_path(lambda path, leaf: leaf[self._place(path)], mine)
        return cut, (mine, others)

    def join(self, trained: Any, rest: Any) -> Any:
        """All parameters, with what was trained in its place."""
        mine, others = rest

        def put(path: Any, new: jax.Array, old: jax.Array) -> jax.Array:
            return old.at[self._place(path)].set(new) if names(path) in self.rows else new

        return nnx.merge_state(jax.tree_util.tree_map_with_path(put, trained, mine), others)

    def count(self, params: Any) -> int:
        """Numbers that train."""
        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lambda p: self.split(p)[0], params)))

    def _place(self, path: Any) -> Any:
        rows = self.rows.get(names(path))
        if rows is None:
            return ...
        return (np.arange(len(rows))[:, None], rows) if rows.ndim > 1 else rows


EVERYTHING = Trainable(lambda path: True)
