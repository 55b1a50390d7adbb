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


def zeros(num_tasks: int, num_slots: int) -> Counters:
    """Counters of no rows."""
    table, column = jnp.zeros((num_tasks, num_slots)), jnp.zeros((num_tasks,))
    return Counters(table, table, column, jnp.zeros((num_slots, num_slots)), column, column)


def add(a: Counters, b: Counters) -> Counters:
    """The counters of both."""
    return jax.tree.map(jnp.add, a, b)


def count(
    plan: Plan, probs: jax.Array, task: jax.Array, num_tasks: int, num_slots: int, *, pairs: bool = True
) -> Counters:
    """Counts one batch.

    Args:
        plan: `[T, K]`.
        probs: `[T, M]`, the gate's scores; their entropy is taken after normalising each row.
        task: `[T]` integers; a row whose task is outside `0..N-1`, or that goes nowhere with all K, is not counted.
        pairs: whether to count pairs, K * (K - 1) / 2 for each row.
    """
    slot, weight, probs = jax.lax.stop_gradient((plan.slot, plan.weight, probs))
    t, k = slot.shape
    somewhere = slot < num_slots
    routed = (task >= 0) & (task < num_tasks) & somewhere.any(1)
    row_task = jnp.where(routed, task, num_tasks).astype(jnp.int32)
    cells = num_tasks * num_slots
    cell = jnp.where(somewhere & routed[:, None], row_task[:, None] * num_slots + slot, cells).reshape(-1)
    per_cell = [
        jax.ops.segment_sum(values.reshape(-1), cell, cells + 1)[:-1].reshape(num_tasks, num_slots)
        for values in (jnp.ones((t, k)), weight)
    ]
    drops = (k - somewhere.sum(1)).astype(jnp.float32)
    per_task = [
        jax.ops.segment_sum(values, row_task, num_tasks + 1)[:-1] for values in (drops, entropy(probs), jnp.ones((t,)))
    ]
    both = _pairs(slot, routed, num_slots) if pairs else jnp.zeros((num_slots, num_slots))
    return Counters(per_cell[0], per_cell[1], per_task[0], both, per_task[1], per_task[2])


def entropy(probs: jax.Array) -> jax.Array:
    """The entropy in nats of each row of non-negative scores `[T, M]`, after normalising it; 0 for a row of zeros."""
    total = probs.sum(1)
    mean_log = jnp.where(probs > 0, probs * jnp.log(jnp.maximum(probs, 1e-37)), 0.0).sum(1)
    safe = jnp.where(total > 0, total, 1.0)
    return jnp.where(total > 0, jnp.maximum(jnp.log(safe) - mean_log / safe, 0.0), 0.0)


def _pairs(slot: jax.Array, routed: jax.Array, num_slots: int) -> jax.Array:
    """`[E, E]`: how many rows chose slots i < j."""
    k = slot.shape[1]
    if k < 2:
        return jnp.zeros((num_slots, num_slots))
    first = jnp.concatenate([slot[:, i] for i in range(k) for _ in range(i + 1, k)])
    second = jnp.concatenate([slot[:, j] for i in range(k) for j in range(i + 1, k)])
    low, high = jnp.minimum(first, second), jnp.maximum(first, second)
    counted = jnp.tile(routed, k * (k - 1) // 2) & (high < num_slots) & (low != high)
    cell = jnp.where(counted, low * num_slots + high, num_slots**2)
    sums = jax.ops.segment_sum(jnp.ones(cell.shape), cell, num_slots**2 + 1)
    return sums[:-1].reshape(num_slots, num_slots)
