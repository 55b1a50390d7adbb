"""AdamW that lets idle experts sleep: the same weights as dense AdamW, whoever wakes when."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import prepared_model
from tolerance import assert_close

from pathways.training import lazy
from pathways.training.loop import batches_of
from pathways.training.optimizer import make_optimizer
from pathways.training.step import initial_state, make_step
from tasks.errors import UserError
from tasks.pipeline import TrainStream

EXPERTS, STEPS = 6, 80
RULE = lazy.Rule(beta1=0.9, beta2=0.98, epsilon=1e-8, weight_decay=0.2)


def rate_of(step):
    """Rises, then falls, as a one-cycle does."""
    return 3e-3 * jnp.minimum((step + 1) / 20, (STEPS - step) / 60)


def history(seed: int):
    """Which experts are awake in each step, and their gradients: one never, one always, one twice far apart."""
    rng = np.random.default_rng(seed)
    active = rng.random((STEPS, EXPERTS)) < 0.15
    active[:, 0], active[:, 1] = False, True
    active[:, 2] = np.isin(np.arange(STEPS), (1, 78))
    grads = rng.normal(size=(STEPS, EXPERTS, 5)) * np.array([1, 1, 1e-3, 1e-7, 1e-8])
    return active, np.where(active[..., None], grads, 0)


def dense(params, grads, decays):
    optimizer = optax.adamw(
        rate_of, RULE.beta1, RULE.beta2, RULE.epsilon, weight_decay=RULE.weight_decay if decays else 0
    )
    state = optimizer.init(params)
    for grad in grads:
        updates, state = optimizer.update(jnp.asarray(grad), state, params)
        params = optax.apply_updates(params, updates)
    return params


def slept(params, grads, active, decays):
    rows, sleep = lazy.Rows(params, jnp.zeros_like(params), jnp.zeros_like(params)), lazy.awake(EXPERTS)
    sleep = jax.tree.map(lambda leaf: leaf.astype(params.dtype), sleep)

    @jax.jit
    def step(rows, sleep, grad, index, number):
        t, rate = number + 1, rate_of(number)
        mine = lazy.woken(lazy.take(rows, index), lazy.take_sleep(sleep, index), RULE, decays)
        mine = lazy.updated(mine, lazy.take(grad, index), RULE, decays, t, rate)
        sleep = lazy.wake(lazy.sleep_on(sleep, RULE, t, rate), index)
        return lazy.put(rows, index, mine), sleep

    for number, (grad, awake) in enumerate(zip(grads, active, strict=True)):
        index = np.full(EXPERTS + 1, EXPERTS, np.int32)
        index[: awake.sum()] = np.flatnonzero(awake)
        rows, sleep = step(rows, sleep, jnp.asarray(grad), jnp.asarray(index), number)
    return lazy.woken(rows, sleep, RULE, decays).value, rows.value


@pytest.mark.parametrize("decays", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sleeping_experts_end_where_dense_adamw_puts_them(seed, decays):
    active, grads = history(seed)
    start = np.random.default_rng(9).normal(size=(EXPERTS, 5))
    with jax.enable_x64(True):
        params = jnp.asarray(start)
        expected = np.asarray(dense(params, grads, decays))
        moved = np.abs(np.asarray(dense(params, grads, False)) - start)[2:, 3:].max()
        found, stale = slept(params, grads, active, decays)
        assert found.dtype == jnp.float64
        found, stale = np.asarray(found), np.asarray(stale)
    assert_close(found[:, :3], expected[:, :3], scale=0)
    # Gradients as small as epsilon: exact at both ends, and between them within a tenth of an expert's own moves.
    assert np.abs(found - expected)[:, 3:].max() < 0.1 * moved
    # And it is not that sleeping changes nothing.
    assert np.abs((stale - expected)[2:, :3]).max() > 1e-4
    single, _ = slept(jnp.asarray(start, jnp.float32), grads.astype(np.float32), active, decays)
    assert_close(single[:, :3], expected[:, :3])


def test_a_sleep_of_any_length_stays_finite():
    sleep = lazy.awake(1)
    rows = lazy.Rows(jnp.ones((1, 2)), jnp.full((1, 2), 1e-3), jnp.array([[1e-6, 0.0]]))
    sleep = jax.lax.fori_loop(1, 20_000, lambda t, s: lazy.sleep_on(s, RULE, t + 0.0, 1e-3), sleep)
    found = lazy.woken(rows, sleep, RULE, decays=True)
    assert all(np.isfinite(leaf).all() for leaf in found)
    assert_close(found.first, jnp.zeros((1, 2)))
    assert abs(found.value[0, 0]) < np.exp(-20_000 * 1e-3 * RULE.weight_decay) + 1e-3


def test_nobody_who_never_moved_is_spoiled():
    """A decay that has shrunk the sums to nothing, and an average that forgets at once: nothing divides by zero."""
    rows = lazy.Rows(jnp.ones((1, 2)), jnp.zeros((1, 2)), jnp.zeros((1, 2)))
    forgetful = replace(RULE, beta2=0.0)
    for rule, steps, rate in ((RULE, 200_000, 2.5e-3), (forgetful, 3, 1e-3)):
        sleep = jax.lax.fori_loop(1, steps, lambda t, s, r=rule, e=rate: lazy.sleep_on(s, r, t + 0.0, e), lazy.awake(1))
        for decays in (False, True):
            assert np.isfinite(lazy.woken(rows, sleep, rule, decays).value).all()


def test_putting_nothing():
    bank = {"w": jnp.arange(6.0).reshape(3, 2)}
    index = jnp.array([3, 3])
    np.testing.assert_array_equal(lazy.put(bank, index, lazy.take(bank, index))["w"], bank["w"])
    assert lazy.wake(lazy.Sleep(*5 * [jnp.zeros((2, 3))]), index).fade1.sum() == 0


@pytest.fixture(scope="module")
def many(tmp_path_factory, cache_folder):
    """A model of many experts whose batches have room for 4 x 8 tokens, so that a step wakes a few of them.

    Its epsilon is far below the least gradient, where sleeping is exact.
    """
    return prepared_model(
        tmp_path_factory.mktemp("lazy"),
        names=("wine", "price"),
        model={"experts": {"mlp": 1000, "swiglu": 600, "identity": 1}},
        encoders={"max_length": 8},
        train={"rows": 4, "weight_decay": 0.1, "epsilon": 1e-15, "learning_rate": 1e-3},
    )


def sleepers_of(prepared, sub, how="auto"):
    rows = prepared.shape.rows * prepared.shape.length
    return lazy.sleepers_for(replace(prepared.config.train, lazy=how), sub.config.model, sub.params, rows)


def trained(prepared, sub, sleepers, steps, spoil=None):
    """The step, the state after some of them, and the last metrics; the loss of step `spoil` is not finite."""
    config = prepared.config.train
    options = {"statistics": False, "sleepers": sleepers}
    optimizer = make_optimizer(config)
    step = make_step(sub, optimizer, prepared.config.balance, seed=0, **options)
    state, metrics = initial_state(sub, optimizer, **options), None
    with closing(TrainStream(prepared.data.train, prepared.weights, prepared.shape, 0)) as stream:
        for number in range(steps):
            batch = batches_of(stream, 1)
            if number == spoil:
                batch["y"] = np.full_like(batch["y"], np.nan)
            state, metrics = step(state, batch)
    return step, state, metrics


def test_a_network_trained_lazily_is_the_one_trained_densely(many):
    prepared, sub, _ = many
    sleepers = sleepers_of(prepared, sub)
    assert sleepers is not None
    assert sleepers.room == {f"{block}-{kind}": 64 for block in range(2) for kind in ("mlp", "swiglu")}
    _, state, found = trained(prepared, sub, sleepers, 7, spoil=4)
    _, expected, wanted = trained(prepared, sub, None, 7, spoil=4)
    assert (int(found.bad_total), int(wanted.bad_total)) == (1, 1)
    assert_close(found.loss, wanted.loss)
    awake = np.asarray(state.asleep.sleep["0-mlp"].fade1) == 1
    assert 0 < awake.mean() < 0.5
    settled = sleepers.settle(state.params, state.asleep)
    jax.tree.map(assert_close, settled, expected.params)
    worst = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.params, expected.params)
    assert max(jax.tree.leaves(worst)) > 2e-4


def test_a_step_that_is_not_finite_leaves_everything(many):
    prepared, sub, _ = many
    sleepers = sleepers_of(prepared, sub)
    before = trained(prepared, sub, sleepers, 3)[1]
    after = trained(prepared, sub, sleepers, 4, spoil=3)[1]
    for name in ("params", "asleep", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(before, name), getattr(after, name))


def test_banks_are_written_in_place(many):
    """Parameters and both moments go out in the buffers they came in; other memory has no room for a copy of them."""
    prepared, sub, batch = many
    sleepers = sleepers_of(prepared, sub)
    step, state, _ = trained(prepared, sub, sleepers, 1)
    memory = step.lower(state, jax.tree.map(lambda leaf: leaf[None], batch)).compile().memory_analysis()
    banks = sum(leaf.nbytes for bank in lazy._banks(state.params).values() for leaf in bank.values())
    assert memory.alias_size_in_bytes > 3 * banks
    assert memory.temp_size_in_bytes < banks


@pytest.mark.parametrize(("how", "rows", "sleeps"), [("auto", 32, True), ("auto", 160, False), ("off", 32, False)])
def test_who_sleeps(many, how, rows, sleeps):
    """Two choices of each row reach 64 of 600 experts at most, or 320."""
    prepared, sub, _ = many
    config = replace(prepared.config.train, lazy=how)
    assert (lazy.sleepers_for(config, sub.config.model, sub.params, rows) is not None) == sleeps
    assert lazy.sleepers_for(replace(config, lazy="on"), sub.config.model, sub.params, 10_000) is not None


def test_what_cannot_sleep_is_told(many):
    prepared, sub, _ = many
    for name, value in (("accumulate", 2), ("moments", "factored"), ("beta2", 0.8)):
        config = replace(prepared.config.train, lazy="on", **{name: value})
        with pytest.raises(UserError, match=rf"(?s)Idle experts cannot sleep here.*train\.{name}"):
            lazy.sleepers_for(config, sub.config.model, sub.params, 32)
    scanned = replace(sub.config.model, scan_layers=True)
    assert lazy.sleepers_for(prepared.config.train, scanned, sub.params, 32) is None


def test_a_kind_without_experts_does_not_hinder(many):
    prepared, sub, _ = many
    banks = {"mlp": {"w_in": jnp.zeros((100, 2, 2))}, "none": {"w_in": jnp.zeros((0, 2))}}
    params = {"blocks": [{"routed": {"banks": banks}}]}
    sleepers = lazy.sleepers_for(prepared.config.train, sub.config.model, params, 4)
    assert sleepers is not None
    assert sleepers.room == {"0-mlp": 8}
    jax.tree.map(np.testing.assert_array_equal, sleepers.settle(params, sleepers.init(params)), params)
