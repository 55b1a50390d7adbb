"""Losses against float64 oracles; masked outputs get exactly no gradient, whatever stands there."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerance import assert_close

from tasks.losses import LOSS_CODE, example_loss, token_loss
from tasks.spec import LOSSES


def oracle(name: str, z: np.ndarray, y: np.ndarray) -> float:
    """The loss of one example's known outputs, in float64."""
    z, y = z.astype(np.float64), y.astype(np.float64)
    if len(z) == 0:
        return 0.0
    if name == "softmax_cross_entropy":
        return float(-(y * (z - z.max() - np.log(np.exp(z - z.max()).sum()))).sum())
    if name == "sigmoid_cross_entropy":
        p = 1 / (1 + np.exp(-z))
        return float(-(y * np.log(p) + (1 - y) * np.log(1 - p)).sum())
    e = np.abs(z - y)
    return float(
        {"squared_error": e**2, "absolute_error": e, "huber": np.where(e <= 1, e**2 / 2, e - 0.5)}[name].mean()
    )


def random_case(n: int = 40, width: int = 7, seed: int = 0):
    rng = np.random.default_rng(seed)
    names = [list(LOSS_CODE)[i % len(LOSS_CODE)] for i in range(n)]
    z = (3 * rng.normal(size=(n, width))).astype(np.float32)
    mask = (rng.random((n, width)) < 0.7).astype(np.float32)
    mask[:5] = 0
    y = rng.random((n, width)).astype(np.float32)
    for i, name in enumerate(names):
        if name == "softmax_cross_entropy" and mask[i].any():
            y[i] = y[i] * mask[i] / (y[i] * mask[i]).sum()
        if name == "sigmoid_cross_entropy":
            y[i] = y[i] > 0.5
    return names, z, y, mask, np.array([LOSS_CODE[name] for name in names], np.int32)


def test_every_loss_a_task_may_name_has_a_code():
    assert {name for names in LOSSES.values() for name in names} == set(LOSS_CODE)
    assert sorted(LOSS_CODE.values()) == list(range(len(LOSS_CODE)))


def test_example_losses_equal_the_oracle():
    names, z, y, mask, code = random_case()
    known = mask > 0
    desired = [oracle(name, z[i][known[i]], y[i][known[i]]) for i, name in enumerate(names)]
    assert_close(jax.jit(example_loss)(z, y, mask, code), desired)


def test_worked_by_hand():
    # softmax over two of three outputs, equal logits: ln 2. Sigmoid at two logits of 0: 2 ln 2.
    # Squared: (1 + 9) / 2 = 5. Absolute: (1 + 3) / 2 = 2. Huber: (0.5 + 2.5) / 2 = 1.5.
    z = jnp.array([[4.0, 4.0, 9.0], [0, 0, 0], [1, 3, 0], [1, 3, 0], [1, 3, 0]])
    y = jnp.array([[1.0, 0, 0], [1, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]])
    mask = jnp.array([[1.0, 1, 0]] * 5)
    assert_close(example_loss(z, y, mask, jnp.arange(5)), [np.log(2), 2 * np.log(2), 5, 2, 1.5])


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 1e30])
def test_masked_outputs_have_exactly_zero_gradient(poison):
    _, z, y, mask, code = random_case()
    z = np.where(mask > 0, z, poison).astype(np.float32)
    y = np.where(mask > 0, y, poison).astype(np.float32)
    loss, gradient = jax.value_and_grad(lambda z: example_loss(z, y, mask, code).sum())(jnp.asarray(z))
    assert np.isfinite(loss)
    assert np.isfinite(gradient).all()
    assert (np.asarray(gradient)[mask == 0] == 0).all()
    assert (np.abs(np.asarray(gradient)[mask > 0]) > 0).mean() > 0.9


def test_gradients_equal_finite_differences():
    names, z, y, mask, code = random_case(n=20, width=4, seed=3)
    gradient = jax.grad(lambda z: example_loss(z, y, mask, code).sum())(jnp.asarray(z))
    step = 1e-5
    desired = np.zeros(z.shape)
    for i, j in np.argwhere(mask > 0):
        known = mask[i] > 0
        ends = []
        for sign in (1, -1):
            moved = z[i].astype(np.float64)
            moved[j] += sign * step
            ends.append(oracle(names[i], moved[known], y[i][known]))
        desired[i, j] = (ends[0] - ends[1]) / (2 * step)
    assert_close(gradient, desired)


def test_extreme_logits_stay_finite():
    z = jnp.array([[1e4, -1e4]] * 2)
    y = jnp.array([[0.0, 1.0]] * 2)
    loss = example_loss(z, y, jnp.ones_like(y), jnp.array([0, 1]))
    assert_close(loss, [2e4, 2e4])


def test_token_losses_equal_the_oracle_and_untagged_tokens_count_nothing():
    rng = np.random.default_rng(1)
    z = rng.normal(size=(2, 5, 6)).astype(np.float32)
    width = np.array([[3] * 5, [6] * 5], np.int32)
    tag = np.array([[0, -1, 2, 1, -1], [5, 4, -1, 0, 3]], np.int32)
    desired = np.zeros((2, 5))
    for b, s in np.argwhere(tag >= 0):
        desired[b, s] = oracle("softmax_cross_entropy", z[b, s, : width[b, s]], np.eye(6)[tag[b, s]][: width[b, s]])
    actual = token_loss(jnp.asarray(z), tag, width)
    gradient = jax.grad(lambda z: token_loss(z, tag, width).sum())(jnp.asarray(z))
    assert_close(actual, desired)
    assert (np.asarray(gradient)[tag < 0] == 0).all()
    assert (np.asarray(gradient)[0, :, 3:] == 0).all()
