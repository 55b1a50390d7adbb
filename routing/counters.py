"""Counters: who went where, as a pytree of sums that adds up over steps and devices.

Axis letters: T rows, K experts per row, N tasks, E slots, M candidates.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from routing.plan import Plan


class Counters(NamedTuple):
    """Sums over rows, for one layer. All float32, so exact up to 2^24 per cell: read them out before that.

    `entropy_sum / routed_rows` is the mean entropy of a task's gate in nats.
    """

    rows: jax.Array  # [N, E]: choices of each slot by rows of each task
    weight: jax.Array  # [N, E]: the sum of their gate weights
    drops: jax.Array  # [N]: choices of routed rows that have no slot
    pairs: jax.Array  # [E, E]: rows that chose both; above the diagonal only, zero if not counted
    entropy_sum: jax.Array  # [N]: over rows, of the entropy of the gate's scores
    routed_rows: jax.Array  # [N]: rows of each task that were routed, each counted once


class Routed(NamedTuple):
    """What one batch's rows did in one layer: small, as it grows with rows and not with slots.

    `slot [T, K]` int32, `weight [T, K]`, `drops [T]` choices without a slot, `entropy [T]` of the gate's scores in
    nats, `task [T]` int32. A row whose task is outside `0..N-1`, or that goes nowhere with all K, is not counted.
    """

    slot: jax.Array
    weight: jax.Array
    drops: jax.Array
    entropy: jax.Array
    task: jax.Array


def zeros(num_tasks: int, num_slots: int) -> Counters:
    """Counters of no rows."""
    table, column = jnp.zeros((num_tasks, num_slots)), jnp.zeros((num_tasks,))
    return Counters(table, table, column, jnp.zeros((num_slots, num_slots)), column, column)


def add(a: Counters, b: Counters) -> Counters:
    """The counters of both."""
    return jax.tree.map(jnp.add, a, b)


@jax.named_scope("statistics")
def routed(plan: Plan, probs: jax.Array, task: jax.Array, num_slots: int) -> Routed:
    """The facts of a batch, `probs [T, M]` being the gate's scores. No gradient flows through them."""
    slot, weight, probs = jax.lax.stop_gradient((plan.slot, plan.weight, probs))
    return Routed(slot, weight, (slot >= num_slots).sum(1).astype(jnp.float32), entropy(probs), task)


@jax.named_scope("statistics")
def count(counters: Counters, batch: Routed, *, pairs: bool = True, counts: jax.Array | bool = True) -> Counters:
    """The counters with a batch added to them.

    Only the cells of what was chosen are read and written, so in a program that gives its counters away (donation) the
    cost follows the rows, not the N * E or E * E cells.

    Args:
        pairs: whether to count pairs, K * (K - 1) / 2 for each row.
        counts: a scalar; where it is false, nothing is counted.
    """
    num_tasks, num_slots = counters.rows.shape
    slot, weight = batch.slot, batch.weight
    somewhere = slot < num_slots
    on = (batch.task >= 0) & (batch.task < num_tasks) & somewhere.any(1) & counts
    task = jnp.where(on, batch.task, num_tasks)
    cell = (task[:, None], jnp.where(somewhere, slot, num_slots))
    both = counters.pairs
    if pairs and slot.shape[1] > 1:
        low, high = _pairs(jnp.where(on[:, None], slot, num_slots))
        both = both.at[low, high].add(1.0, mode="drop")
    return Counters(
        counters.rows.at[cell].add(1.0, mode="drop"),
        counters.weight.at[cell].add(weight, mode="drop"),
        counters.drops.at[task].add(batch.drops, mode="drop"),
        both,
        counters.entropy_sum.at[task].add(batch.entropy, mode="drop"),
        counters.routed_rows.at[task].add(1.0, mode="drop"),
    )


def entropy(probs: jax.Array) -> jax.Array:
    """The entropy in nats of each row of non-negative scores `[T, M]`, after normalising it; 0 for a row of zeros."""
    total = probs.sum(1)
    mean_log = jnp.where(probs > 0, probs * jnp.log(jnp.maximum(probs, 1e-37)), 0.0).sum(1)
    safe = jnp.where(total > 0, total, 1.0)
    return jnp.where(total > 0, jnp.maximum(jnp.log(safe) - mean_log / safe, 0.0), 0.0)


def _pairs(slot: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each pair of choices of each row as (lower slot, higher slot), `[T * K * (K - 1) / 2]`.

    A choice without a slot has the highest number of all, so a pair with one lies outside of the counters; so does a
    pair of a slot with itself, as it is moved there.
    """
    k = slot.shape[1]
    first = jnp.concatenate([slot[:, i] for i in range(k) for _ in range(i + 1, k)])
    second = jnp.concatenate([slot[:, j] for i in range(k) for j in range(i + 1, k)])
    low, high = jnp.minimum(first, second), jnp.maximum(first, second)
    return low, jnp.where(low == high, jnp.iinfo(jnp.int32).max, high)
