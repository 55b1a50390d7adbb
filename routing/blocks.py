"""Bookkeeping of grouped work: sort assignments once, then lay them out in buckets or fixed-size blocks per group.

Axis letters: N assignments, G groups, C capacity of a bucket, L blocks, b rows in a block, T rows, K assignments per
row, P places (G*C or L*b), D width.

All shapes are static and nothing is read back by the host. Layouts are made by one sort and integer gathers; `spread`
and `collect` move activations between rows and places, and each is the other's transpose, so that gradients are
gathers too.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Sorted(NamedTuple):
    """Assignments sorted by group; those of group `num_groups` ("nowhere") come last and belong to no group."""

    order: jax.Array  # [N] int32: the assignment at each sorted position
    start: jax.Array  # [G + 1] int32: where each group begins in the sorted order; the last is where nowhere begins
    rank: jax.Array  # [N] int32: the position of each assignment within its group
    group: jax.Array  # [N] int32: as given


class Layout(NamedTuple):
    """Assignments laid out in L blocks of b places, each block of one group. A bucket is a block of C places.

    `N` in `order` means an empty place, `L * b` in `position` an assignment without a place.
    """

    order: jax.Array  # [L * b] int32: the assignment at each place
    position: jax.Array  # [N] int32: the place of each assignment
    block_group: jax.Array  # [L] int32: the group of each block; the blocks past `used` repeat the last group
    used: jax.Array  # [] int32: how many blocks hold something; they come first


def sort_by_group(group: jax.Array, num_groups: int) -> Sorted:
    """Sorts assignments stably by their group.

    Args:
        group: `[N]` integers in `0..num_groups`; `num_groups` means nowhere.
    """
    n = group.shape[0]
    group = group.astype(jnp.int32)
    index = lax.iota(jnp.int32, n)
    if (num_groups + 1) * max(n, 1) < np.iinfo(np.int32).max:
        # One packed key sorts several times faster than a stable argsort on some versions of XLA's CPU backend.
        order = lax.sort(group * n + index, is_stable=False) % max(n, 1)
    else:
        order = jnp.argsort(group, stable=True).astype(jnp.int32)
    ordered = group[order]
    start = jnp.searchsorted(ordered, jnp.arange(num_groups + 1, dtype=jnp.int32)).astype(jnp.int32)
    rank = jnp.zeros_like(group).at[order].set(index - start[ordered], unique_indices=True)
    return Sorted(order, start, rank, group)


def counts(by_group: Sorted) -> jax.Array:
    """`[G]` int32: assignments of each group."""
    return jnp.diff(by_group.start)


def bucket_layout(by_group: Sorted, capacity: int, first: int = 0, num: int | None = None) -> Layout:
    """One bucket of `capacity` places for each group of `first..first + num`: the first `capacity` of its assignments.

    The rest of a group overflows: lay it out with `block_layout(..., skip=capacity)`.
    """
    n, num = by_group.order.shape[0], by_group.start.shape[0] - 1 - first if num is None else num
    start, stop = by_group.start[first : first + num, None], by_group.start[first + 1 : first + num + 1, None]
    at = start + jnp.arange(capacity, dtype=jnp.int32)
    order = jnp.where(at < stop, by_group.order.at[at].get(mode="clip"), n).reshape(-1)
    local = by_group.group - first
    inside = (local >= 0) & (local < num) & (by_group.rank < capacity)
    position = jnp.where(inside, local * capacity + by_group.rank, num * capacity)
    return Layout(order, position, jnp.arange(num, dtype=jnp.int32), jnp.full((), num, jnp.int32))


def max_blocks(n: int, num_groups: int, block_size: int) -> int:
    """The most blocks that `n` assignments in `num_groups` groups can need: sum of ceil(n_g / b) is at most
    `(n + g * (b - 1)) / b` with `g = min(n, num_groups)` groups that are not empty."""
    return (n + min(n, num_groups) * (block_size - 1)) // block_size


def block_layout(by_group: Sorted, block_size: int, first: int = 0, num: int | None = None, *, skip: int = 0) -> Layout:
    """Lays the groups `first..first + num` out in blocks of `block_size`, each of one group, in the groups' order.

    Args:
        skip: leave out the first `skip` assignments of each group (they are in its bucket).
    """
    n, num = by_group.order.shape[0], by_group.start.shape[0] - 1 - first if num is None else num
    limit = max_blocks(max(n - skip, 0), num, block_size)
    start = by_group.start[first : first + num] + skip
    count = jnp.maximum(by_group.start[first + 1 : first + num + 1] - start, 0)
    end_block = jnp.cumsum((count + block_size - 1) // block_size, dtype=jnp.int32)
    first_block = jnp.concatenate([jnp.zeros((1,), jnp.int32), end_block])
    block = jnp.arange(limit, dtype=jnp.int32)
    block_group = jnp.minimum(jnp.searchsorted(end_block, block, side="right"), num - 1).astype(jnp.int32)
    within = (block - first_block[block_group])[:, None] * block_size + jnp.arange(block_size, dtype=jnp.int32)
    at = start[block_group][:, None] + within
    order = jnp.where(within < count[block_group][:, None], by_group.order.at[at].get(mode="clip"), n).reshape(-1)
    local = by_group.group - first
    inside = (local >= 0) & (local < num) & (by_group.rank >= skip)
    position = first_block[jnp.clip(local, 0, num - 1)] * block_size + by_group.rank - skip
    position = jnp.where(inside, position, limit * block_size)
    return Layout(order, position, block_group, end_block[-1])


def take_rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """`x[index]` along the first axis; an index past the end gives zeros, whatever `x` holds."""
    if not x.shape[0]:
        return jnp.zeros(index.shape + x.shape[1:], x.dtype)
    return x.at[index].get(mode="fill", fill_value=0)


@jax.custom_vjp
def spread(x: jax.Array, row: jax.Array, place: jax.Array) -> jax.Array:
    """Copies rows to places.

    Args:
        x: `[T, D]`.
        row: `[P]` int32, the row of each place; `T` for an empty one, which gets zeros.
        place: `[T, K]` int32, the places of each row, the inverse of `row`; `P` for none.
    """
    del place
    return take_rows(x, row)


def _spread_forward(x, row, place):
    return take_rows(x, row), place


def _spread_backward(place, dy):
    return take_rows(dy, place).sum(1, dtype=jnp.promote_types(dy.dtype, jnp.float32)).astype(dy.dtype), None, None


spread.defvjp(_spread_forward, _spread_backward)


@jax.custom_vjp
def collect(y: jax.Array, row: jax.Array, place: jax.Array) -> jax.Array:
    """Takes from each row's only place what stands there: the transpose of `spread` for K = 1.

    Args:
        y: `[P, D]`.
        row: `[P]` int32 and place: `[T]` int32, as in `spread`. A row without a place gets zeros.
    """
    del row
    return take_rows(y, place)


def _collect_forward(y, row, place):
    return take_rows(y, place), row


def _collect_backward(row, dx):
    return take_rows(dx, row), None, None


collect.defvjp(_collect_forward, _collect_backward)
