"""Surgery on banks: pure functions on dicts of arrays whose leading axis counts experts.

They take and give numpy or jax arrays alike, and copy what they change. A bank of identity experts has no leaves, so
its size travels with its owner, not in the bank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Array = TypeVar("Array", np.ndarray, jax.Array)


def size(bank: Mapping[str, Array]) -> int | None:
    """The number of experts of a bank; None for a bank without leaves.

    Raises:
        ValueError: if the leaves disagree.
    """
    sizes = {name: leaf.shape[0] for name, leaf in bank.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"the leaves of a bank must hold the same number of experts, got {sizes}")
    return next(iter(sizes.values()), None)


def grow(bank: Mapping[str, Array], new: Mapping[str, Array]) -> dict[str, Array]:
    """`bank` followed by the experts of `new`, in `bank`'s types. The slots of the old ones do not move."""
    _check_match(bank, new)
    return {
        name: _numpy_of(leaf).concatenate([leaf, new[name].astype(leaf.dtype)])  # type: ignore[misc]
        for name, leaf in bank.items()
    }


def select(bank: Mapping[str, Array], indices: Sequence[int] | np.ndarray) -> dict[str, Array]:
    """The experts at `indices`, in their order; an index may repeat (a copy).

    Raises:
        ValueError: for an index outside `0..E-1`.
    """
    index = _checked(bank, indices)
    return {name: leaf[index] for name, leaf in bank.items()}


def insert(
    bank: Mapping[str, Array], indices: Sequence[int] | np.ndarray, rows: Mapping[str, Array]
) -> dict[str, Array]:
    """`bank` with the experts at `indices` replaced by those of `rows`, the others untouched.

    Raises:
        ValueError: for an index outside `0..E-1` or given twice, or rows that do not match.
    """
    index = _checked(bank, indices)
    _check_match(bank, rows)
    if len(np.unique(index)) != len(index):
        raise ValueError(f"expected each expert once, got indices {index.tolist()}")
    if bank and size(rows) != len(index):
        raise ValueError(f"expected {len(index)} experts for {len(index)} indices, got {size(rows)}")
    return {name: _replace(leaf, index, rows[name]) for name, leaf in bank.items()}


def _replace(leaf: Array, index: np.ndarray, rows: Array) -> Array:
    if isinstance(leaf, np.ndarray):
        leaf = leaf.copy()
        leaf[index] = np.asarray(rows, leaf.dtype)
        return leaf
    return leaf.at[index].set(jnp.asarray(rows, leaf.dtype))  # type: ignore[return-value]


def _numpy_of(leaf: Array):
    return np if isinstance(leaf, np.ndarray) else jnp


def _checked(bank: Mapping[str, Array], indices: Sequence[int] | np.ndarray) -> np.ndarray:
    index, num = np.asarray(indices, np.int64).reshape(-1), size(bank)
    if num is not None and index.size and (index.min() < 0 or index.max() >= num):
        raise ValueError(f"expected indices of experts in 0..{num - 1}, got {int(index.min())}..{int(index.max())}")
    return index


def _check_match(bank: Mapping[str, Array], other: Mapping[str, Array]) -> None:
    if set(bank) != set(other):
        raise ValueError(f"expected the leaves {sorted(bank)}, got {sorted(other)}")
    for name, leaf in bank.items():
        if leaf.shape[1:] != other[name].shape[1:]:
            raise ValueError(f"expected {name} of shape [E, *{leaf.shape[1:]}], got [E, *{other[name].shape[1:]}]")
