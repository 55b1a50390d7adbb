"""Layouts of grouped work against plain Python, and rows that move by gathers both ways."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing import blocks

N, GROUPS = 23, 4


@partial(jax.jit, static_argnames=("size", "skip"))
def lay_out(group, size, skip):
    by_group = blocks.sort_by_group(group, GROUPS)
    return by_group, blocks.bucket_layout(by_group, skip), blocks.block_layout(by_group, size, skip=skip)


@pytest.mark.parametrize(("size", "skip"), [(1, 0), (4, 0), (3, 2), (8, 5)])
@given(group=st.lists(st.integers(0, GROUPS), min_size=N, max_size=N))
def test_layouts_against_lists(size, skip, group):
    members = [[i for i, g in enumerate(group) if g == wanted] for wanted in range(GROUPS)]
    by_group, bucket, layout = jax.tree.map(np.asarray, lay_out(jnp.asarray(group), size, skip))
    assert by_group.order[: by_group.start[-1]].tolist() == flat(members)
    assert blocks.counts(by_group).tolist() == [len(m) for m in members]
    padded = [m[:skip] + [N] * (skip - len(m[:skip])) for m in members]
    assert bucket.order.tolist() == flat(padded)
    expected, owners = [], []
    for g, m in enumerate(members):
        for start in range(skip, len(m), size):
            part = m[start : start + size]
            expected += part + [N] * (size - len(part))
            owners.append(g)
    assert layout.used == len(owners)
    assert layout.block_group[: len(owners)].tolist() == owners
    assert layout.order[: len(expected)].tolist() == expected
    assert (layout.order[len(expected) :] == N).all()
    check_inverse(bucket)
    check_inverse(layout)
    placed = (bucket.position < len(bucket.order)).astype(int) + (layout.position < len(layout.order))
    assert placed.tolist() == [int(g < GROUPS) for g in group]


def flat(lists):
    return [item for part in lists for item in part]


def check_inverse(layout):
    for place, assignment in enumerate(layout.order):
        if assignment < N:
            assert layout.position[assignment] == place


def test_the_bound_on_blocks_is_reached():
    # 4 groups of 1, 1, 1 and 6 rows in blocks of 3: 1 + 1 + 1 + 2 = 5 blocks; bound (9 + 4 * 2) // 3 = 5.
    group = jnp.asarray([0, 1, 2] + [3] * 6)
    layout = blocks.block_layout(blocks.sort_by_group(group, 4), 3)
    assert blocks.max_blocks(9, 4, 3) == 5
    assert layout.used == len(layout.block_group) == 5


def test_a_range_of_groups():
    # Groups 1 and 2 only, as 0 and 1: assignments 1, 3 of group 1; 2 of group 2.
    by_group = blocks.sort_by_group(jnp.asarray([0, 1, 2, 1, 3]), 4)
    layout = blocks.block_layout(by_group, 2, 1, 2)
    assert layout.order[:4].tolist() == [1, 3, 2, 5]
    assert layout.block_group[:2].tolist() == [0, 1]
    assert blocks.bucket_layout(by_group, 1, 1, 2).order.tolist() == [1, 2]


def test_sorting_without_packed_keys(monkeypatch):
    """Where key and index do not fit one integer, a stable argsort gives the same."""
    group = jnp.asarray(np.random.default_rng(0).integers(0, 5, 40))
    packed = blocks.sort_by_group(group, 4)
    monkeypatch.setattr(blocks.np, "iinfo", lambda _: type("Limit", (), {"max": 0}))
    jax.tree.map(np.testing.assert_array_equal, blocks.sort_by_group(group, 4), packed)


def test_spread_and_collect_are_each_others_transpose():
    group = jnp.asarray([2, 0, 4, 0, 0, 1])
    layout = blocks.block_layout(blocks.sort_by_group(group, 4), 2)
    x = jnp.arange(12.0).reshape(6, 2)
    places, pull = jax.vjp(lambda x: blocks.spread(x, layout.order, layout.position[:, None]), x)
    y = jnp.cos(jnp.arange(places.size, dtype=jnp.float32)).reshape(places.shape)
    rows, push = jax.vjp(lambda y: blocks.collect(y, layout.order, layout.position), y)
    np.testing.assert_array_equal(pull(y)[0], rows)
    np.testing.assert_array_equal(push(x)[0], places)
    np.testing.assert_array_equal(rows[2], 0)
    back = blocks.collect(places, layout.order, layout.position)
    np.testing.assert_array_equal(back, x.at[2].set(0))  # row 2 has no group


def test_spread_sums_the_gradients_of_k_places():
    row, place = jnp.array([0, 1, 0, 2]), jnp.array([[0, 2], [1, 4]])
    grad = jax.grad(lambda x: (blocks.spread(x, row, place) * jnp.array([[1.0], [10], [100], [1000]])).sum())
    np.testing.assert_array_equal(grad(jnp.ones((2, 1))), [[101.0], [10.0]])


def test_empty_places_get_zeros_whatever_the_rows_hold():
    x = jnp.array([[jnp.nan], [2.0]])
    np.testing.assert_array_equal(blocks.take_rows(x, jnp.array([1, 2])), [[2.0], [0.0]])
    np.testing.assert_array_equal(blocks.take_rows(x[:0], jnp.array([0, 0])), [[0.0], [0.0]])
