"""Counters, worked by hand, and their sums."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from tolerance import assert_close

from routing import counters
from routing.plan import Plan

# Rows: two of task 0, one of task 1, one of task 1 with a choice that has no slot (3), padding, task unknown.
PLAN = Plan(
    jnp.array([[0, 2], [2, 0], [1, 2], [1, 3], [3, 3], [0, 1]], jnp.int32),
    jnp.array([[0.75, 0.25], [0.5, 0.5], [0.6, 0.4], [1.0, 0.0], [0.0, 0.0], [0.5, 0.5]]),
)
PROBS = jnp.array([[0.5, 0.25, 0.25], [1.0, 0, 0], [0.8, 0.8, 0.8], [0.5, 0.5, 0], [0, 0, 0], [1, 1, 1]])
TASK = jnp.array([0, 0, 1, 1, 0, -1])


def count(plan=PLAN, probs=PROBS, task=TASK, tasks=2, slots=3, **options):
    return counters.count(counters.zeros(tasks, slots), counters.routed(plan, probs, task, slots), **options)


def test_by_hand():
    got = count()
    np.testing.assert_array_equal(got.rows, [[2, 0, 2], [0, 2, 1]])
    assert_close(got.weight, [[1.25, 0, 0.75], [0, 1.6, 0.4]])
    np.testing.assert_array_equal(got.drops, [0, 1])
    np.testing.assert_array_equal(got.pairs, [[0, 0, 2], [0, 0, 1], [0, 0, 0]])
    np.testing.assert_array_equal(got.routed_rows, [2, 2])
    # Task 0: 0.5 ln 2 + 2 * 0.25 ln 4 = 1.5 ln 2, and 0. Task 1: uniform over three after normalising, ln 3; and ln 2.
    assert_close(got.entropy_sum, [1.5 * np.log(2), np.log(3) + np.log(2)])


def test_without_pairs():
    got = count(pairs=False)
    assert got.pairs.shape == (3, 3)
    assert not got.pairs.any()


def test_parts_add_up():
    def part(rows):
        return jax.tree.map(lambda leaf: leaf[rows], (PLAN, PROBS, TASK))

    first, second = part(slice(0, 2)), part(slice(2, 6))
    jax.tree.map(assert_close, counters.add(count(*first), count(*second)), count())
    jax.tree.map(assert_close, counters.count(count(*first), counters.routed(*second, 3)), count())


def test_a_batch_that_does_not_count_leaves_the_counters_as_they_are():
    before = count()
    broken = counters.routed(PLAN._replace(weight=PLAN.weight * jnp.nan), PROBS * jnp.nan, TASK, 3)
    after = jax.jit(lambda a, on: counters.count(a, broken, counts=on))(before, jnp.array(False))
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_cells_that_were_not_chosen_are_neither_read_nor_written():
    slots, plan = 1024, Plan(jnp.array([[5, 1000], [7, 9]], jnp.int32), jnp.ones((2, 2)))
    step = jax.jit(counters.count, donate_argnums=0)
    lowered = step.lower(
        counters.zeros(3, slots), counters.routed(plan, jnp.ones((2, 4)), jnp.zeros(2, jnp.int32), slots)
    )
    memory = lowered.compile().memory_analysis()
    # Two tables [3, slots] and the pairs [slots, slots], in place: nothing of their size besides.
    assert memory.alias_size_in_bytes >= 4 * slots * (slots + 6)
    assert memory.temp_size_in_bytes < 4 * slots


def test_all_pairs_of_three():
    plan = Plan(jnp.array([[2, 0, 1], [3, 1, 0]], jnp.int32), jnp.ones((2, 3)))
    got = count(plan, jnp.ones((2, 4)), jnp.zeros(2, jnp.int32), 1, 4)
    # Row 1: 0-1, 0-2, 1-2; row 2: 0-1, 0-3, 1-3.
    np.testing.assert_array_equal(got.pairs, [[0, 2, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]])


def test_no_gradient_and_no_nan():
    grad = jax.grad(lambda probs: sum(leaf.sum() for leaf in count(probs=probs)))(PROBS)
    np.testing.assert_array_equal(grad, 0)
