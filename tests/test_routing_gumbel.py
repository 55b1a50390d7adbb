"""The Gumbel matrix: choices, weights, samples and gradients, by hand and in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerance import assert_close

from routing.gates import GateConfig, route
from routing.gumbel import gumbel_matrix

MATRIX = jnp.array([[2.0, -1.0, 0.5, 1.0], [-3.0, -1.0, -2.0, -5.0], [0.3, 0.1, 9.0, 9.0]])
EXISTS = jnp.array([[True] * 4, [True] * 4, [True, True, False, False]])
GATE = jnp.array([0, 1, 2, 0, 0])
VALID = jnp.array([True, True, True, True, False])


def test_without_noise_what_is_positive_is_on_and_at_least_the_best() -> None:
    config = GateConfig("gumbel_matrix", 3, renormalize=False)
    found = gumbel_matrix(config, MATRIX, GATE, valid=VALID, candidates=EXISTS)
    # Gate 0: 2, 1 and .5 are positive. Gate 1: none is; its best alone. Gate 2: both that exist. The last is padding.
    assert found.choice.tolist() == [[0, 3, 2], [1, 4, 4], [0, 1, 4], [0, 3, 2], [4, 4, 4]]
    assert found.weight.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1], [0, 0, 0]]
    assert found.load[0].tolist() == [1, 0, 1, 1]
    assert found.probs[2, 2:].tolist() == [0, 0]
    assert_close(found.probs[0, 1], 1 / (1 + np.exp(1.0)))
    assert bool((found.logits[4] == -jnp.inf).all())


def test_weights_share_one_and_no_more_than_k_are_on() -> None:
    found = gumbel_matrix(GateConfig("gumbel_matrix", 2), MATRIX, GATE, valid=VALID, candidates=EXISTS)
    assert found.choice.tolist() == [[0, 3], [1, 4], [0, 1], [0, 3], [4, 4]]
    assert found.weight.tolist() == [[0.5, 0.5], [1, 0], [0.5, 0.5], [0.5, 0.5], [0, 0]]


def test_rows_of_a_gate_share_one_sample() -> None:
    gate = jnp.arange(64) % 3
    args = {"valid": jnp.ones((64,), bool), "candidates": jnp.ones((3, 4), bool)}
    config = GateConfig("gumbel_matrix", 4)
    found = gumbel_matrix(config, jnp.zeros((3, 4)), gate, key=jax.random.key(0), **args)
    for one in range(3):
        assert len({tuple(row) for row in np.asarray(found.choice)[gate == one].tolist()}) == 1
    again = gumbel_matrix(config, jnp.zeros((3, 4)), gate, key=jax.random.key(0), **args)
    assert np.array_equal(found.weight, again.weight)


def test_samples_are_on_as_often_as_the_sigmoid_says_at_any_temperature() -> None:
    logits = jnp.array([[-1.0, 0.0, 2.0, 1.0, -0.5]])
    args = {"valid": jnp.ones((1,), bool), "candidates": jnp.ones((1, 5), bool)}
    for temperature in (0.2, 3.0):
        config = GateConfig("gumbel_matrix", 5, temperature=temperature)
        one = lambda key, c=config: gumbel_matrix(c, logits, jnp.zeros((1,), int), key=key, **args).load[0]  # noqa: E731
        load = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 4000))
        chance = np.asarray(jax.nn.sigmoid(logits[0]))
        none = np.prod(1 - chance)
        # The best is on even where none is; that adds at most the chance of none. Four deviations of 4000 coins: .032.
        off = np.asarray(load.mean(0)) - chance
        assert (off > -0.032).all(), (temperature, off)
        assert (off < 0.032 + none).all(), (temperature, off)


def test_gradients_are_those_of_the_sigmoid() -> None:
    value = jnp.array([[3.0, -1.0]])

    def output(matrix: jax.Array, renormalize: bool) -> jax.Array:
        config = GateConfig("gumbel_matrix", 2, renormalize=renormalize, temperature=0.5)
        exists = jnp.ones(matrix.shape, bool)
        found = gumbel_matrix(config, matrix, jnp.zeros((1,), int), valid=jnp.ones((1,), bool), candidates=exists)
        return jnp.sum(found.weight * value)

    logits = jnp.array([[2.0, 1.0]])
    slope = np.array([s * (1 - s) / 0.5 for s in 1 / (1 + np.exp(-np.array([2.0, 1.0]) / 0.5))])
    assert_close(jax.grad(output)(logits, False)[0], slope * [3.0, -1.0])
    # (3 a - b) / (a + b) at a = b = 1: 3/2 - 2/4 = 1 by a, -1/2 - 2/4 = -1 by b.
    assert_close(jax.grad(output)(logits, True)[0], slope * [1.0, -1.0])


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="at most 4"):
        gumbel_matrix(GateConfig("gumbel_matrix", 5), MATRIX, GATE, valid=VALID, candidates=EXISTS)
    with pytest.raises(ValueError, match="temperature above 0"):
        GateConfig("gumbel_matrix", 1, temperature=0.0)
    with pytest.raises(ValueError, match=r"routing\.gumbel"):
        route(GateConfig("gumbel_matrix", 1), MATRIX, valid=jnp.ones((3,), bool))
