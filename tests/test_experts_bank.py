"""Kinds and banks: what they cost, how they grow, and that a fresh expert is silent."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experts import bank as banks
from experts.kinds import KINDS, ExpertKind, get_kind, register

KEY = jax.random.key(0)
LEARNED = [name for name, kind in KINDS.items() if kind.output_names]


@pytest.mark.parametrize("name", sorted(KINDS))
def test_parameters_are_those_of_a_bank(name):
    bank = get_kind(name).init(KEY, 3, 4, 6, jnp.float32)
    assert sum(leaf.size for leaf in bank.values()) == 3 * get_kind(name).parameters(4, 6)
    assert all(leaf.shape[0] == 3 for leaf in bank.values())


def test_operations_by_hand():
    # One row through D=4, F=6: a product D x F is 2 * 24 = 48 operations; the MLP has two, SwiGLU three.
    assert [get_kind(name).operations(4, 6) for name in ("mlp", "swiglu", "identity")] == [96, 144, 0]


@pytest.mark.parametrize("name", LEARNED)
def test_a_fresh_expert_is_silent_and_can_learn(name):
    kind = get_kind(name)
    fresh = kind.fresh(KEY, 2, 4, 6)
    x = jax.random.normal(KEY, (2, 5, 4))
    np.testing.assert_array_equal(kind.apply(fresh, x), 0)
    grads = jax.grad(lambda bank: (kind.apply(bank, x) * x).sum())(fresh)
    assert all(np.abs(grads[leaf]).max() > 0 for leaf in kind.output_names)
    assert np.abs(kind.apply(kind.init(KEY, 2, 4, 6, jnp.float32), x)).max() > 0.1


def test_identity_cannot_start_silent():
    with pytest.raises(ValueError, match="'identity' has no output projection"):
        get_kind("identity").fresh(KEY, 1, 4, 6)


def test_the_registry_refuses_what_it_has_and_suggests_what_is_near():
    with pytest.raises(ValueError, match="'mlp' is registered already"):
        register(KINDS["mlp"])
    with pytest.raises(ValueError, match="unknown expert kind 'swigul'.*did you mean 'swiglu'"):
        get_kind("swigul")
    with pytest.raises(ValueError, match="unknown expert kind 'zzz'"):
        get_kind("zzz")


def test_a_kind_can_be_added(monkeypatch):
    monkeypatch.setattr("experts.kinds.KINDS", dict(KINDS))
    double = ExpertKind("double", lambda *_: {}, lambda bank, x: 2 * x, lambda d, f: 0, lambda d, f: d)
    assert register(double) is get_kind("double")


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_surgery(array):
    bank = {"w": array(np.arange(6.0).reshape(3, 2)), "b": array(np.arange(3.0))}
    new = {"w": array(np.full((1, 2), 9.0)), "b": array(np.full(1, 9.0))}
    grown = banks.grow(bank, new)
    assert banks.size(grown) == 4
    assert type(grown["w"]) is type(bank["w"])
    np.testing.assert_array_equal(grown["b"], [0, 1, 2, 9])
    chosen = banks.select(grown, [3, 0, 0])
    np.testing.assert_array_equal(chosen["w"], [[9, 9], [0, 1], [0, 1]])
    back = banks.insert(bank, [1], new)
    np.testing.assert_array_equal(back["w"], [[0, 1], [9, 9], [4, 5]])
    np.testing.assert_array_equal(bank["b"], [0, 1, 2])  # the argument is untouched
    np.testing.assert_array_equal(banks.insert(bank, [2, 0], banks.select(bank, [2, 0]))["w"], bank["w"])


def test_a_bank_without_leaves():
    assert banks.size({}) is None
    assert banks.grow({}, {}) == banks.select({}, [5]) == banks.insert({}, [0], {}) == {}


def test_mistakes_are_told():
    bank = {"w": np.zeros((3, 2)), "b": np.zeros(3)}
    with pytest.raises(ValueError, match=r"0..2, got 1..3"):
        banks.select(bank, [1, 3])
    with pytest.raises(ValueError, match="same number of experts, got {'w': 3, 'b': 2}"):
        banks.size({"w": bank["w"], "b": bank["b"][:2]})
    with pytest.raises(ValueError, match=r"expected the leaves \['b', 'w'\], got \['w'\]"):
        banks.grow(bank, {"w": bank["w"]})
    with pytest.raises(ValueError, match="expected w of shape"):
        banks.grow(bank, {"w": np.zeros((1, 5)), "b": np.zeros(1)})
    with pytest.raises(ValueError, match="expected 1 experts for 1 indices, got 3"):
        banks.insert(bank, [0], bank)
    with pytest.raises(ValueError, match="each expert once"):
        banks.insert(bank, [0, 0, 1], bank)
