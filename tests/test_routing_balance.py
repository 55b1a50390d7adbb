"""Balance losses, worked by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerance import assert_close

from routing import balance
from routing.gates import GateConfig, route
from routing.plan import Plan


def plan_of(slot, weight):
    return Plan(jnp.asarray(slot, jnp.int32), jnp.asarray(weight, jnp.float32))


def test_importance_loss():
    # Weights by slot: slot 0: 0.75 + 0.5 = 1.25, slot 1: 0.25, slot 2: 0.5; the third row is nowhere (3).
    plan = plan_of([[0, 1], [0, 2], [3, 3]], [[0.75, 0.25], [0.5, 0.5], [0, 0]])
    assert_close(balance.weight_by_slot(plan, 3), [1.25, 0.25, 0.5])
    # mean = 2 / 3; deviations 7/12, -5/12, -2/12; variance = (49 + 25 + 4) / 144 / 3 = 78 / 432 = 0.180556
    # CV^2 = 0.180556 / (4 / 9) = 0.40625
    assert_close(balance.importance_loss(plan, 3), 0.40625)


def test_load_loss():
    # Sums over rows: [1.5, 0.5]; mean 1, variance (0.25 + 0.25) / 2 = 0.25, CV^2 = 0.25.
    load = jnp.array([[1.0, 0.25], [0.5, 0.25]])
    assert_close(balance.load_loss(load), 0.25)


def test_cv_of_nothing_is_zero_with_a_finite_gradient():
    value, grad = jax.value_and_grad(balance.squared_coefficient_of_variation)(jnp.zeros(4))
    assert value == 0
    assert np.isfinite(grad).all()
    assert balance.squared_coefficient_of_variation(jnp.array([3.0])) == 0


def test_load_balancing_loss():
    # Two valid rows, E = 2, K = 1, both to slot 0: f = [1, 0]; P = mean probs = [0.75, 0.25] -> 2 * 0.75 = 1.5.
    # The third row is padding: its probabilities must not count.
    plan = plan_of([[0], [0], [2]], [[0.9], [0.6], [0]])
    probs = jnp.array([[0.9, 0.1], [0.6, 0.4], [0.5, 0.5]])
    assert_close(balance.load_balancing_loss(plan, probs, jnp.array([True, True, False])), 1.5)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_perfect_balance_is_one_for_any_k(k):
    slot = (np.arange(6)[:, None] + np.arange(k)) % 6
    loss = balance.load_balancing_loss(plan_of(slot, np.ones((6, k))), jnp.full((6, 6), 1 / 6), jnp.ones(6, bool))
    assert_close(loss, 1.0)


def test_load_balancing_gradient_pushes_the_crowded_expert_down():
    # d loss / d P_i = E f_i: with f = [1, 0], E = 2 and 2 rows each probability of slot 0 gets 2 * 1 / 2 = 1.
    plan = plan_of([[0], [0]], [[1.0], [1.0]])
    grad = jax.grad(lambda probs: balance.load_balancing_loss(plan, probs, jnp.ones(2, bool)))(jnp.full((2, 2), 0.5))
    assert_close(grad, [[1.0, 0.0], [1.0, 0.0]])


def test_router_z_loss():
    # Row 1: logsumexp(0, 0) = ln 2; row 2: one candidate, logsumexp(3) = 3; row 3 is padding.
    # ((ln 2)^2 + 9) / 2 = (0.480453 + 9) / 2 = 4.7402265
    logits = jnp.array([[0.0, 0.0], [3.0, -jnp.inf], [jnp.nan, 7.0]])
    valid = jnp.array([True, True, False])
    value, grad = jax.value_and_grad(balance.router_z_loss)(logits, valid)
    assert_close(value, 4.7402265)
    # d/dl = 2 lse softmax / rows: row 1: ln 2 * 0.5, row 2: 3 for its one candidate.
    assert_close(grad, [[0.34657359, 0.34657359], [3.0, 0.0], [0.0, 0.0]])
    assert balance.router_z_loss(jnp.full((1, 2), -jnp.inf), jnp.array([True])) == 0


def test_a_diverged_logit_is_not_hidden():
    assert np.isnan(balance.router_z_loss(jnp.array([[jnp.nan, 1.0]]), jnp.array([True])))


def test_sums_of_parts_give_the_loss_of_the_whole():
    """What a psum over devices would add up; a mean of the parts' losses is another number."""
    rng = np.random.default_rng(0)
    slot, probs = rng.integers(0, 4, (8, 2)), jnp.asarray(rng.dirichlet(np.ones(4), 8), jnp.float32)
    plan, valid = plan_of(slot, np.ones((8, 2))), jnp.array([True] * 5 + [False] * 3)
    plan = plan._replace(slot=jnp.where(valid[:, None], plan.slot, 4))
    whole = balance.load_balancing_loss(plan, probs, valid)
    halves = [slice(0, 4), slice(4, 8)]
    counts = sum(balance.count_by_slot(Plan(plan.slot[h], plan.weight[h]), 4) for h in halves)
    sums = sum(jnp.where(valid[h, None], probs[h], 0).sum(0) for h in halves)
    assert_close(balance.load_balancing_loss_from_sums(counts, sums, jnp.asarray(5), 2), whole)
    apart = [balance.load_balancing_loss(Plan(plan.slot[h], plan.weight[h]), probs[h], valid[h]) for h in halves]
    assert abs(np.mean(apart) - whole) > 1e-3


def test_update_balance_bias():
    # mean of [6, 2, 4] is 4: the crowded one falls, the idle one rises, the average one stays.
    bias = balance.update_balance_bias(jnp.array([0.1, 0.0, 0.2]), jnp.array([6, 2, 4]), 0.01)
    assert_close(bias, [0.09, 0.01, 0.2])


def test_max_violation():
    assert_close(balance.max_violation(jnp.array([6, 2, 4])), 0.5)  # 6 / 4 - 1
    assert balance.max_violation(jnp.zeros(3)) == 0


def test_the_bias_balances_a_biased_router():
    """Loss-free balancing brings the largest load from over 3 times the mean to under 1.2 times."""
    key = jax.random.key(0)
    logits = jax.random.normal(key, (512, 8)) + jnp.array([3.0, 1, 0, 0, 0, 0, -1, -3])
    config, valid = GateConfig("sigmoid_top_k", 2), jnp.ones(512, bool)

    @jax.jit
    def step(bias):
        routing = route(config, logits, valid=valid, balance_bias=bias)
        counts = routing.load.sum(0)
        return balance.update_balance_bias(bias, counts, 0.01), counts

    bias, counts = step(jnp.zeros(8))
    assert balance.max_violation(counts) > 2
    for _ in range(200):
        bias, counts = step(bias)
    assert balance.max_violation(counts) < 0.2
