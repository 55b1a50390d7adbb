"""What the optimizer remembers of the experts, in less memory than Adam's two numbers for each parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class Stored(NamedTuple):
    """`count` updates, and both moments in the type they are stored in."""

    count: jax.Array
    first: Any
    second: Any


class Factored(NamedTuple):
    """`count` updates; of a matrix the mean square over its columns `[..., A]` and over its rows `[..., Z]`, of
    anything less the mean square itself and nothing."""

    count: jax.Array
    rows: Any
    columns: Any


def adam_direction(
    first: jax.Array, second: jax.Array, beta1: float, beta2: float, epsilon: float, count: jax.Array
) -> jax.Array:
    """Adam's move for a rate of 1, from moments after `count` updates that began with zeros."""
    return first / (1 - beta1**count) / (jnp.sqrt(second / (1 - beta2**count)) + epsilon)


def scale_by_stored_adam(beta1: float, beta2: float, epsilon: float, dtype: Any) -> optax.GradientTransformation:
    """Adam whose moments are kept in `dtype` and computed in the gradient's.

    bfloat16 keeps 8 bits, so an average must move by more than 1/256 of itself in a step to move at all: good for a
    `beta2` of 0.98, useless for 0.999, which `pathways.config.check` refuses.
    """

    def init(params: Any) -> Stored:
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, dtype), params)
        return Stored(jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.copy, zeros))

    def update(grads: Any, state: Stored, params: Any = None) -> tuple[Any, Stored]:
        count = state.count + 1
        first = _averaged(state.first, grads, beta1)
        second = _averaged(state.second, jax.tree.map(jnp.square, grads), beta2)

        moves = jax.tree.map(lambda m, v: adam_direction(m, v, beta1, beta2, epsilon, count), first, second)
        kept = jax.tree.map(lambda leaf: leaf.astype(dtype), (first, second))
        return moves, Stored(count, *kept)

    return optax.GradientTransformation(init, update)


def scale_by_factored(beta2: float, epsilon: float, matrix: Callable[[Any], bool]) -> optax.GradientTransformation:
    """No first moment, and the second of a matrix as the product of its row and column means over their mean.

    For banks of experts: a parameter costs next to nothing to remember (Shazeer et al. 2017, appendix D).

    Args:
        matrix: whether a leaf, by its key path, holds matrices in its last two axes; others keep their mean squares.
    """

    def row_means(squares: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, q: q.mean(-1) if matrix(path) else q, squares)

    def column_means(squares: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, q: q.mean(-2) if matrix(path) else q[:0], squares)

    def init(params: Any) -> Factored:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return Factored(jnp.zeros((), jnp.int32), row_means(zeros), column_means(zeros))

    def update(grads: Any, state: Factored, params: Any = None) -> tuple[Any, Factored]:
        count, squares = state.count + 1, jax.tree.map(jnp.square, grads)
        rows = _averaged(state.rows, row_means(squares), beta2)
        columns = _averaged(state.columns, column_means(squares), beta2)

        def direction(path: Any, g: jax.Array, row: jax.Array, column: jax.Array) -> jax.Array:
            second = row
            if matrix(path):
                mean = jnp.maximum(row.mean(-1, keepdims=True), jnp.finfo(row.dtype).tiny)
                second = (row / mean)[..., None] * column[..., None, :]
            return g / (jnp.sqrt(second / (1 - beta2**count)) + epsilon)

        moves = jax.tree_util.tree_map_with_path(direction, grads, rows, columns)
        return moves, Factored(count, rows, columns)

    return optax.GradientTransformation(init, update)


def _averaged(old: Any, new: Any, beta: float) -> Any:
    return jax.tree.map(lambda o, n: beta * o.astype(n.dtype) + (1 - beta) * n, old, new)
