"""Moments in less memory: against Adam, against the paper's formula, and in a training."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import prepared_model
from tolerance import assert_close

from pathways.training.lazy import sleepers_for
from pathways.training.moments import scale_by_factored, scale_by_stored_adam
from pathways.training.optimizer import make_optimizer
from pathways.training.step import initial_state, make_step


def gradients(steps: int, shape: tuple[int, ...]):
    return np.random.default_rng(0).normal(size=(steps, *shape)).astype(np.float32)


def moves(transform, grads):
    state = transform.init(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:]), grads))
    found = []
    for i in range(len(jax.tree.leaves(grads)[0])):
        move, state = transform.update(jax.tree.map(lambda leaf, i=i: jnp.asarray(leaf[i]), grads), state)
        found.append(move)
    return found, state


def test_stored_in_float32_it_is_adam():
    grads = gradients(10, (3, 4, 5))
    mine, _ = moves(scale_by_stored_adam(0.9, 0.98, 1e-8, jnp.float32), grads)
    theirs, _ = moves(optax.scale_by_adam(0.9, 0.98, 1e-8), grads)
    for a, b in zip(mine, theirs, strict=True):
        assert_close(a, b)


def test_stored_in_bfloat16_it_is_nearly_adam():
    grads = gradients(60, (3, 4, 5))
    mine, state = moves(scale_by_stored_adam(0.9, 0.98, 1e-8, jnp.bfloat16), grads)
    theirs, _ = moves(optax.scale_by_adam(0.9, 0.98, 1e-8), grads)
    assert {leaf.dtype for leaf in (state.first, state.second)} == {np.dtype(jnp.bfloat16)}
    assert mine[-1].dtype == jnp.float32
    assert_close(mine[-1], theirs[-1], "bfloat16")


def is_matrix(path) -> bool:
    return path[-1].key == "w"


def test_factored_by_hand():
    # Squares 1 4 / 9 16: row means 2.5, 12.5; column means 5, 10; their mean 7.5. Entry (0, 0): 2.5 * 5 / 7.5.
    grads = {"w": np.array([[[[1.0, -2.0], [3.0, 4.0]]]], np.float32), "b": np.array([[[2.0, -3.0]]], np.float32)}
    (move,), state = moves(scale_by_factored(0.98, 0.0, is_matrix), grads)
    second = np.outer([2.5, 12.5], [5, 10]) / 7.5
    assert_close(move["w"][0], np.array([[1, -2], [3, 4]]) / np.sqrt(second))
    assert_close(move["b"], [[1.0, -1.0]])
    assert {name: leaf.shape for name, leaf in state.rows.items()} == {"w": (1, 2), "b": (1, 2)}
    assert {name: leaf.shape for name, leaf in state.columns.items()} == {"w": (1, 2), "b": (0, 2)}


def test_factored_equals_adam_without_momentum_where_squares_are_a_product():
    rng = np.random.default_rng(1)
    scale = rng.uniform(0.5, 2, (3, 4, 1)) * rng.uniform(0.5, 2, (3, 1, 5))
    grads = {"w": (scale * rng.choice([-1, 1], (20, 3, 4, 5))).astype(np.float32)}
    mine, _ = moves(scale_by_factored(0.98, 1e-8, is_matrix), grads)
    theirs, _ = moves(optax.scale_by_adam(0.0, 0.98, 1e-8), grads)
    assert_close(mine[-1]["w"], theirs[-1]["w"])


def test_an_expert_without_rows_does_not_move():
    grads = {"w": np.zeros((3, 2, 4, 5), np.float32)}
    for move in moves(scale_by_factored(0.98, 1e-8, is_matrix), grads)[0]:
        np.testing.assert_array_equal(move["w"], 0)


@pytest.fixture(scope="module")
def model(tmp_path_factory, cache_folder):
    return prepared_model(tmp_path_factory.mktemp("moments"), model={"experts": {"mlp": 16}}, names=("wine", "price"))


@pytest.mark.parametrize(
    ("moments", "lazy"),
    [("float32", "off"), ("bfloat16", "off"), ("factored", "off"), ("float32", "on"), ("bfloat16", "on")],
)
def test_each_trains_in_the_memory_it_promises(model, moments, lazy):
    prepared, sub, batch = model
    config = replace(prepared.config.train, moments=moments, lazy=lazy, steps=30)
    sleepers = sleepers_for(config, sub.config.model, sub.params, 128)
    optimizer, options = make_optimizer(config), {"statistics": False, "sleepers": sleepers}
    step = make_step(sub, optimizer, prepared.config.balance, seed=0, **options)
    state = initial_state(sub, optimizer, **options)
    banks = sum(leaf.nbytes for path, leaf in sub.flat().items() if "banks" in path)
    others = sum(leaf.nbytes for path, leaf in sub.flat().items() if "banks" not in path)
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves((state.opt_state, state.asleep))) - 2 * others
    promised = {"float32": 2.0, "bfloat16": 1.0, "factored": 0.2}[moments] * banks
    assert 0.2 * promised < kept < promised + 0.05 * banks
    batches = jax.tree.map(lambda leaf: leaf[None], batch)
    losses = []
    for _ in range(30):
        state, metrics = step(state, batches)
        losses.append(float(metrics.loss))
    assert losses[-1] < 0.3 * losses[0]
