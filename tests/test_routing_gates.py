"""Gates: logits, choices, weights, smooth load, slots."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_close

from routing.gates import GateConfig, GateKind, gate_logits, route, sum_by_slot, to_slots

KINDS: tuple[GateKind, ...] = ("noisy_top_k", "softmax_top_k", "sigmoid_top_k")
ALL = partial(jnp.ones, dtype=bool)


def softmax(x):
    power = np.exp(x - np.max(x, -1, keepdims=True))
    return power / power.sum(-1, keepdims=True)


@pytest.mark.parametrize("num_gates", [1, 3, 40])
def test_logits_and_their_gradients(num_gates):
    """Against einsum over gathered kernels in float64."""
    rng = np.random.default_rng(num_gates)
    x, kernel = rng.normal(size=(50, 6)), rng.normal(size=(num_gates, 6, 5))
    bias, task = rng.normal(size=(num_gates, 5)), rng.normal(size=(50, 6))
    gate = rng.integers(0, num_gates, 50)
    pull = rng.normal(size=(50, 5))
    expected = np.einsum("td,tdm->tm", x + task, kernel[gate]) + bias[gate]

    def loss(x, kernel, bias, task):
        logits = gate_logits(x, kernel, jnp.asarray(gate), bias=bias, task_embedding=task)
        return (logits * pull).sum(), logits

    arguments = [jnp.asarray(a, jnp.float32) for a in (x, kernel, bias, task)]
    grads, logits = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(*arguments)
    assert logits.dtype == jnp.float32
    assert_close(logits, expected)
    d_x = np.einsum("tm,tdm->td", pull, kernel[gate])
    d_kernel, d_bias = np.zeros_like(kernel), np.zeros_like(bias)
    np.add.at(d_kernel, gate, np.einsum("td,tm->tdm", x + task, pull))
    np.add.at(d_bias, gate, pull)
    for actual, desired in zip(grads, (d_x, d_kernel, d_bias, d_x), strict=True):
        assert_close(actual, desired)


def test_the_router_is_float32_for_bfloat16_rows():
    x = jnp.asarray([[1.0, 1 / 256]], jnp.bfloat16)
    logits = gate_logits(x, jnp.ones((1, 2, 1), jnp.float32), jnp.zeros(1, jnp.int32))
    assert logits[0, 0] == 1 + 1 / 256  # bfloat16 would round the sum to 1


def test_a_row_without_a_gate_has_zero_logits():
    logits = gate_logits(jnp.ones((3, 2)), jnp.ones((2, 2, 4)), jnp.array([0, 2, 1]))
    np.testing.assert_array_equal(logits, [[2] * 4, [0] * 4, [2] * 4])


def test_softmax_top_k():
    # exp of ln(1, 2, 5, 2) over 10: probs 0.1, 0.2, 0.5, 0.2; the tie of candidates 1 and 3 goes to 1.
    logits = jnp.log(jnp.array([[1.0, 2, 5, 2]]))
    routing = route(GateConfig("softmax_top_k", 2), logits, valid=ALL(1))
    np.testing.assert_array_equal(routing.choice, [[2, 1]])
    assert_close(routing.probs, [[0.1, 0.2, 0.5, 0.2]])
    assert_close(routing.weight, [[5 / 7, 2 / 7]])
    np.testing.assert_array_equal(routing.load, [[0, 1, 1, 0]])
    raw = route(GateConfig("softmax_top_k", 2, renormalize=False), logits, valid=ALL(1))
    assert_close(raw.weight, [[0.5, 0.2]])


def test_sigmoid_top_k_selects_with_the_bias_and_weighs_without():
    # sigmoid of ln 3, ln 1, ln 1/3 = 0.75, 0.5, 0.25; with bias 0, 0, 0.4 the scores are 0.75, 0.5, 0.65.
    logits = jnp.log(jnp.array([[3.0, 1, 1 / 3]]))
    routing = route(GateConfig("sigmoid_top_k", 2), logits, valid=ALL(1), balance_bias=jnp.array([0, 0, 0.4]))
    np.testing.assert_array_equal(routing.choice, [[0, 2]])
    assert_close(routing.weight, [[0.75, 0.25]])
    assert_close(routing.probs, [[0.75, 0.5, 0.25]])


def test_the_bias_gets_no_gradient():
    def loss(bias):
        routing = route(GateConfig("sigmoid_top_k", 2), jnp.array([[1.0, 0.5, 0]]), valid=ALL(1), balance_bias=bias)
        return (routing.weight * jnp.array([1.0, 2])).sum()

    np.testing.assert_array_equal(jax.grad(loss)(jnp.zeros(3)), 0)


def test_noisy_top_k_without_noise_is_the_softmax_over_the_top():
    logits = jnp.array([[0.0, 1, 2, -1]])
    routing = route(GateConfig("noisy_top_k", 2), logits, valid=ALL(1), deterministic=True)
    np.testing.assert_array_equal(routing.choice, [[2, 1]])
    assert_close(routing.weight, softmax(np.array([[2.0, 1]])))
    np.testing.assert_array_equal(routing.load, [[0, 1, 1, 0]])


def test_smooth_load_by_hand():
    """K = 1: P(x, i) = Phi((clean_i - max of the other H) / deviation_i); at zero kernels the deviation is ln 2."""
    config, key = GateConfig("noisy_top_k", 1, min_noise=0.0), jax.random.key(3)
    logits = jnp.array([[0.5, 0.0, -0.5]])
    routing = route(config, logits, valid=ALL(1), key=key, noise_logits=jnp.zeros((1, 3)))
    noisy = np.asarray(logits + jax.random.normal(key, (1, 3)) * np.log(2))[0]
    others = np.array([max(noisy[1], noisy[2]), max(noisy[0], noisy[2]), max(noisy[0], noisy[1])])
    expected = jax.scipy.stats.norm.cdf((np.asarray(logits)[0] - others) / np.log(2))
    assert_close(routing.load[0], expected)
    assert routing.choice[0, 0] == noisy.argmax()


@pytest.mark.parametrize("k", [1, 2])
def test_smooth_load_is_the_chance_to_be_chosen(k):
    """P(x, i) is exact given the others' noise, so its mean over draws is the frequency of being chosen."""
    logits = jnp.broadcast_to(jnp.array([1.0, 0.3, 0, -0.8]), (20000, 4))
    routing = route(
        GateConfig("noisy_top_k", k),
        logits,
        valid=ALL(20000),
        key=jax.random.key(0),
        noise_logits=jnp.zeros_like(logits),
    )
    frequency = (routing.choice[..., None] == jnp.arange(4)).any(1).mean(0)
    # Standard error of a frequency over 20,000 draws: at most 0.0036; five of them.
    np.testing.assert_allclose(routing.load.mean(0), frequency, atol=0.018)


def test_smooth_load_teaches_the_router():
    def loss(logits):
        key = jax.random.key(0)
        return route(GateConfig("noisy_top_k", 1), logits, valid=ALL(4), key=key, noise_logits=logits).load[:, 0].sum()

    grad = jax.grad(loss)(jnp.zeros((4, 3)))
    assert (grad[:, 0] > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_padded_candidates_are_never_chosen(kind):
    """Row 0 has 2 candidates, row 1 has one, row 2 is padding of NaN; K = 2."""
    logits = jnp.array([[0.0, -1, 9, 9], [-5.0, 9, 9, 9], [jnp.nan] * 4])
    valid = jnp.array([True, True, False])
    arguments = {"valid": valid, "key": jax.random.key(0), "noise_logits": jnp.where(jnp.isnan(logits), logits, -3.0)}
    count, mask = jnp.array([2, 1, 4]), jnp.arange(4) < jnp.array([2, 1, 4])[:, None]
    routing = route(GateConfig(kind, 2), logits, candidates=count, **arguments)
    jax.tree.map(
        np.testing.assert_array_equal, routing, route(GateConfig(kind, 2), logits, candidates=mask, **arguments)
    )
    assert sorted(np.asarray(routing.choice[0])) == [0, 1]
    np.testing.assert_array_equal(routing.choice[1:], [[0, 4], [4, 4]])
    assert_close(routing.weight.sum(1), [1.0, 1, 0])
    np.testing.assert_array_equal(routing.weight[1:], [[1, 0], [0, 0]])
    for values in (routing.probs, routing.load):
        np.testing.assert_array_equal(np.asarray(values)[~np.asarray(mask & valid[:, None])], 0)

    def loss(logits):
        r = route(GateConfig(kind, 2), logits, candidates=count, **arguments)
        return (r.weight * jnp.array([1.0, 2])).sum() + (r.probs**2).sum() + (r.load**2).sum()

    assert np.isfinite(jax.grad(loss)(logits)).all()


@given(seed=st.integers(0, 99), kind=st.sampled_from(KINDS), scale=st.sampled_from([0.0, 1.0, 1e4]))
def test_choices_are_distinct_and_weights_sum_to_one(seed, kind, scale):
    rng = np.random.default_rng(seed)
    logits = jnp.asarray(scale * rng.normal(size=(8, 5)), jnp.float32)
    mask = jnp.asarray(rng.random((8, 5)) < 0.6)
    routing = route(GateConfig(kind, 3), logits, valid=ALL(8), candidates=mask, deterministic=True)
    for choice, weight, exists in zip(*map(np.asarray, (routing.choice, routing.weight, mask)), strict=True):
        real = choice[choice < 5]
        assert len(set(real)) == len(real) == min(3, exists.sum())
        assert exists[real].all()
        assert (weight[choice == 5] == 0).all()
        if len(real) and not (kind == "sigmoid_top_k" and scale == 1e4):  # a sigmoid may underflow to 0
            assert weight.sum() == pytest.approx(1, abs=1e-5)
    assert_close((routing.load > 0).sum(1), np.minimum(3, mask.sum(1)))


def test_ties_go_to_the_lowest_index():
    for kind in KINDS:
        routing = route(GateConfig(kind, 2), jnp.zeros((1, 5)), valid=ALL(1), deterministic=True)
        np.testing.assert_array_equal(routing.choice, [[0, 1]])


@pytest.mark.parametrize("renormalize", [True, False])
def test_gradient_of_the_weights(renormalize):
    """Against the same formula in numpy by central differences."""
    logits, pull = np.array([0.3, 1.2, -0.4, 0.9]), np.array([1.0, -2])

    def by_hand(z):
        chosen = softmax(z)[[1, 3]]
        return (chosen / chosen.sum() if renormalize else chosen) @ pull

    steps = np.eye(4) * 1e-5
    expected = [(by_hand(logits + s) - by_hand(logits - s)) / 2e-5 for s in steps]
    config = GateConfig("softmax_top_k", 2, renormalize)
    grad = jax.grad(lambda z: (route(config, z[None], valid=ALL(1)).weight[0] * pull).sum())(jnp.asarray(logits))
    assert_close(grad, expected)


def test_to_slots_and_sums():
    slots = jnp.array([[4, 1, 5], [0, 4, 2]])  # gate 0 has two candidates, 5 = nowhere
    routing = route(
        GateConfig("softmax_top_k", 2),
        jnp.array([[0.0, 1, 9], [3.0, 2, 1], [0.0, 0, 0]]),
        valid=jnp.array([True, True, False]),
        candidates=(slots < 5)[jnp.array([0, 1, 0])],
    )
    gate = jnp.array([0, 1, 0])
    plan = to_slots(routing, slots, gate, 5)
    np.testing.assert_array_equal(plan.slot, [[1, 4], [0, 4], [5, 5]])
    np.testing.assert_array_equal(plan.weight[2], 0)
    sums = sum_by_slot(jnp.array([[1.0, 2, 3], [10, 20, 30], [100, 200, 300]]), slots, gate, 5)
    # slot 0: 10; slot 1: 2 + 200; slot 2: 30; slot 4: 1 + 100 + 20; the 303 of nowhere are not kept.
    np.testing.assert_array_equal(sums, [10, 202, 30, 0, 121])


def test_one_gate_for_all_rows():
    slots = jnp.array([[2, 0]])
    routing = route(GateConfig("softmax_top_k", 1), jnp.array([[0.0, 1], [1, 0]]), valid=ALL(2))
    np.testing.assert_array_equal(to_slots(routing, slots, jnp.array([7, 7]), 3).slot, [[0], [2]])
    np.testing.assert_array_equal(sum_by_slot(routing.load, slots, jnp.array([7, 7]), 3), [1, 0, 1])


def test_mistakes_are_told():
    with pytest.raises(ValueError, match="unknown kind of gate 'top', expected one of noisy_top_k"):
        GateConfig("top", 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1, got 0"):
        GateConfig("softmax_top_k", 0)
    logits = jnp.zeros((1, 2))
    with pytest.raises(ValueError, match="at most 2, the number of candidates, got 3"):
        route(GateConfig("softmax_top_k", 3), logits, valid=ALL(1))
    with pytest.raises(ValueError, match="got no key"):
        route(GateConfig("noisy_top_k", 1), logits, valid=ALL(1), noise_logits=logits)
    with pytest.raises(ValueError, match="got no noise_logits"):
        route(GateConfig("noisy_top_k", 1), logits, valid=ALL(1), key=jax.random.key(0))
    with pytest.raises(ValueError, match="no balance_bias for noisy_top_k"):
        route(GateConfig("noisy_top_k", 1), logits, valid=ALL(1), balance_bias=jnp.zeros(2), deterministic=True)
