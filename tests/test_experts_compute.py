"""Every backend, kind and load against a dense oracle in float64: outputs and all gradients."""

from __future__ import annotations

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh
from tolerance import assert_close

from experts import native, triton
from experts.buckets import bucket_capacity, overflow_block
from experts.compute import BACKENDS, Placed, _warn_of_dense, apply_experts, choose_backend
from experts.kinds import KINDS, get_kind
from routing.plan import Plan

HERE = sorted(set(BACKENDS) - (set() if native.available() else {"native"}))
"""The backends that this machine has; `native` needs a compiler."""
WIDTH, HIDDEN = 6, 10
SLOTS = {"mlp": (0, 5), "swiglu": (5, 3), "identity": (8, 1)}
NUM_SLOTS = 9
ROWS = 37  # one number of rows, and slots as an argument: each backend compiles once for all loads


def slots_of(load: str, rng: np.random.Generator) -> np.ndarray:
    """`[37, 2]` slots of a load (but for one row); 9 means nowhere."""
    if load == "even":
        return np.stack([rng.permutation(NUM_SLOTS)[:2] for _ in range(ROWS)])
    if load == "skewed":
        return np.stack([rng.permutation(NUM_SLOTS)[:2] for _ in range(ROWS)]) // 3
    if load == "empty experts":
        return np.stack([rng.permutation([0, 4, 8])[:2] for _ in range(ROWS)])
    pairs = {"one expert": [3, NUM_SLOTS], "one kind": [6, 7], "twice the same": [2, 2], "nowhere": [NUM_SLOTS] * 2}
    return np.array([[5, 1]]) if load == "one row" else np.full((ROWS, 2), pairs[load])


LOADS = ["even", "skewed", "empty experts", "one expert", "one kind", "twice the same", "nowhere", "one row"]


def problem(load: str):
    rng = np.random.default_rng(0)
    slot = slots_of(load, rng).astype(np.int32)
    weight = np.where(slot < NUM_SLOTS, rng.uniform(0.1, 1, slot.shape), 0)
    params = {}
    for kind in ("mlp", "swiglu"):
        shapes = get_kind(kind).init(jax.random.key(0), SLOTS[kind][1], WIDTH, HIDDEN, jnp.float32)
        # Values that bfloat16 holds exactly, so that all types see one problem.
        params[kind] = {name: np.asarray(rng.integers(-16, 17, leaf.shape) / 32.0) for name, leaf in shapes.items()}
    x = rng.integers(-32, 33, (len(slot), WIDTH)) / 16.0
    return params, x, slot, weight


def apply(params, x, weight, slot, backend, block_size=4):
    banks = {kind: Placed(params.get(kind, {}), *place) for kind, place in SLOTS.items()}
    return apply_experts(banks, x, Plan(slot, weight), backend=backend, block_size=block_size)


@partial(jax.jit, static_argnames="backend")
def run(params, x, weight, slot, backend):
    """Output and gradients of a fixed combination of it."""

    def loss(params, x, weight):
        y = apply(params, x, weight, slot, backend)
        return (y.astype(weight.dtype) * jnp.cos(jnp.arange(y.size, dtype=weight.dtype)).reshape(y.shape)).sum(), y

    grads, y = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(params, x, weight)
    return y, grads


_ORACLE: dict[str, tuple] = {}


def oracle(load: str):
    if load not in _ORACLE:
        with jax.enable_x64(True):
            params, x, slot, weight = jax.tree.map(jnp.asarray, problem(load))
            assert x.dtype == jnp.float64
            _ORACLE[load] = jax.tree.map(np.asarray, run(params, x, weight, slot, "dense"))
    return _ORACLE[load]


@pytest.mark.parametrize("load", LOADS)
def test_the_oracle_is_the_sum_over_chosen_experts(load):
    params, x, slot, weight = problem(load)
    expected = np.zeros_like(x)
    for t, k in np.ndindex(*slot.shape):
        for kind, (start, num) in SLOTS.items():
            if start <= slot[t, k] < start + num:
                p = {name: leaf[slot[t, k] - start] for name, leaf in params.get(kind, {}).items()}
                expected[t] += weight[t, k] * one_expert(kind, p, x[t])
    assert_close(oracle(load)[0], expected, "float64")


def one_expert(kind: str, p: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    if kind == "mlp":
        h = x @ p["w_in"] + p["b_in"]
        h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        return h @ p["w_out"] + p["b_out"]
    if kind == "swiglu":
        gate = x @ p["w_gate"]
        return (gate / (1 + np.exp(-gate)) * (x @ p["w_up"])) @ p["w_down"]
    return x


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", HERE)
def test_every_backend_equals_the_oracle(backend, dtype, load):
    params, x, slot, weight = problem(load)
    params, x = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), (params, x))
    y, grads = run(params, x, jnp.asarray(weight, jnp.float32), jnp.asarray(slot), backend)
    assert y.dtype == x.dtype
    expected_y, expected_grads = oracle(load)
    assert_close(np.asarray(y, np.float64), expected_y, dtype)
    jax.tree.map(lambda a, b: assert_close(np.asarray(a, np.float64), b, dtype), grads, expected_grads)


@pytest.mark.parametrize("backend", [name for name in HERE if name not in ("native", "triton")])
def test_float64_is_kept(backend):
    with jax.enable_x64(True):
        params, x, slot, weight = jax.tree.map(jnp.asarray, problem("skewed"))
        y, grads = run(params, x, weight, slot, backend)
    assert_close(y, oracle("skewed")[0], "float64")
    jax.tree.map(lambda a, b: assert_close(a, b, "float64"), grads, oracle("skewed")[1])


@pytest.mark.parametrize("backend", [name for name in HERE if name != "dense"])
@given(slots=st.lists(st.integers(0, NUM_SLOTS + 3), min_size=2 * ROWS, max_size=2 * ROWS))
def test_wild_plans(backend, slots):
    """Any slots, repeated ones and ones past the end too."""
    slot = jnp.asarray(slots, jnp.int32).reshape(ROWS, 2)
    params, x, _, weight = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), problem("even"))
    for actual, desired in zip(
        jax.tree.leaves(run(params, x, weight, slot, backend)),
        jax.tree.leaves(run(params, x, weight, slot, "dense")),
        strict=True,
    ):
        assert_close(actual, desired)


@pytest.mark.parametrize("block_size", [1, 8, 64, None])
def test_any_block_size(block_size):
    params, x, slot, weight = jax.tree.map(jnp.asarray, problem("one kind"))
    y = jax.jit(lambda p, x: apply(p, x, weight, slot, "buckets", block_size))(params, x)
    assert_close(y, oracle("one kind")[0])


@pytest.mark.parametrize("backend", HERE)
def test_a_row_that_is_nowhere_spoils_nothing(backend):
    params, x, slot, weight = problem("even")
    slot[[0, 7]], weight[[0, 7]] = NUM_SLOTS, 0
    params, weight = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), (params, weight))
    spoiled = x.copy()
    spoiled[[0, 7]] = np.nan
    slot = jnp.asarray(slot)
    good, good_grads = run(params, jnp.asarray(x, jnp.float32), weight, slot, backend)
    y, grads = run(params, jnp.asarray(spoiled, jnp.float32), weight, slot, backend)
    np.testing.assert_array_equal(y, good)
    np.testing.assert_array_equal(y[jnp.array([0, 7])], 0)
    jax.tree.map(np.testing.assert_array_equal, grads, good_grads)


@pytest.mark.parametrize("backend", [name for name in HERE if name in ("buckets", "native", "triton")])
def test_no_activation_is_scattered(backend):
    """Forward and backward on CPU hold no floating-point scatter outside the overflow's weights."""
    params, x, slot, weight = problem("even")
    params, x, weight = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), (params, x, weight))
    grad = jax.grad(lambda p, x, w: apply(p, x, w, jnp.asarray(slot), backend).sum(), argnums=(0, 1, 2))
    found = [eqn for eqn in equations(jax.make_jaxpr(grad)(params, x, weight).jaxpr) if "scatter" in eqn.primitive.name]
    floating = [eqn.outvars[0].aval for eqn in found if jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating)]
    shapes = {leaf.shape for bank in params.values() for leaf in bank.values()} if backend == "buckets" else set()
    assert found
    assert all(aval.shape in shapes for aval in floating), floating


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def test_capacity():
    # 1.25 * 8192 / 8 = 1280, a multiple of 8 already; 1.25 * 10 / 4 = 3.1 -> 8.
    assert bucket_capacity(8192, 8) == 1280
    assert bucket_capacity(10, 4) == 8
    # 2 assignments can reach 2 of 64 experts: no buckets, so 62 are not read.
    assert bucket_capacity(2, 64) == 0
    assert [overflow_block(capacity) for capacity in (0, 8, 40, 1280)] == [1, 16, 64, 64]


FEW = [name for name in HERE if name in ("buckets", "native")]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", FEW)
def test_a_few_rows_read_the_chosen_experts_alone(backend, dtype):
    """In the program compiled for CPU nothing is made for every expert: banks are handed on, and slices taken."""
    if (backend, dtype) == ("native", "bfloat16"):
        pytest.skip("not chosen: it widens the bank first")
    num, kind = 64, get_kind("mlp")
    bank = kind.init(jax.random.key(0), num, WIDTH, HIDDEN, jnp.float32)
    slot = jnp.array([[5, 17], [17, 40], [5, 6]], jnp.int32)

    def layer(bank, x):
        return apply_experts({"mlp": Placed(bank, 0, num)}, x, Plan(slot, jnp.ones((3, 2))), backend=backend)

    x = jnp.ones((3, WIDTH), dtype)
    program = jax.jit(layer).lower(bank, x).compile()
    # Neither a bank nor, as a product of all of them with buckets would be, rows for each of its experts.
    made = set(re.findall(rf"= \w+\[{num},[1-9]\d*,[1-9]\d*\]\S* ([\w-]+)\(", program.as_text()))
    assert "parameter" in made
    assert made <= {"parameter", "get-tuple-element", "bitcast"}
    # What the experts that were not chosen hold does not matter.
    chosen = jnp.zeros(num, bool).at[slot].set(True)
    spoiled = {
        name: jnp.where(chosen.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, jnp.nan) for name, leaf in bank.items()
    }
    np.testing.assert_array_equal(program(spoiled, x), program(bank, x))


def test_mistakes_are_told():
    params, x, slot, weight = problem("one row")
    plan = Plan(jnp.asarray(slot), jnp.asarray(weight))
    mlp = params["mlp"]
    with pytest.raises(ValueError, match="unknown backend 'fast', expected auto or one of buckets"):
        apply_experts({"mlp": (mlp, 0, 5)}, x, plan, backend="fast")
    with pytest.raises(ValueError, match="slots 4..6 of 'swiglu' overlap 'mlp', which ends at slot 4"):
        apply_experts({"mlp": (mlp, 0, 5), "swiglu": (params["swiglu"], 4, 3)}, x, plan)
    with pytest.raises(ValueError, match="expected 4 experts in leaf 'w_in' of 'mlp', got 5"):
        apply_experts({"mlp": ({"w_in": mlp["w_in"]}, 0, 4)}, x, plan)
    with pytest.raises(ValueError, match=r"expected slots and weights \[T, K\] for x"):
        apply_experts({"mlp": (mlp, 0, 5)}, x[:0], plan)
    with pytest.raises(ValueError, match="block_size of at least 1, got 0"):
        apply_experts({"mlp": (mlp, 0, 5)}, x, plan, block_size=0)


def test_the_choice(monkeypatch):
    monkeypatch.delenv("PATHWAYS_BACKEND", raising=False)
    fast = {True: "native", False: "buckets"}
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float64):
        assert choose_backend(dtype, "cpu") == fast[native.available(dtype)]
    assert choose_backend(jnp.float64, "cpu") == "buckets"
    on_tpu = "ragged" if jax.__version_info__ >= (0, 12) else "buckets"
    assert (choose_backend(jnp.float32, "gpu"), choose_backend(jnp.bfloat16, "tpu")) == ("triton", on_tpu)
    assert choose_backend(jnp.float64, "gpu") == "buckets"
    monkeypatch.setenv("PATHWAYS_BACKEND", "buckets")
    assert choose_backend(jnp.float32) == "buckets"
    monkeypatch.setenv("PATHWAYS_BACKEND", "bukets")
    with pytest.raises(
        ValueError, match=r"unknown backend 'bukets' in \$PATHWAYS_BACKEND, expected auto or one of buckets"
    ):
        choose_backend(jnp.float32)


def test_the_choice_follows_the_mesh_in_force(monkeypatch):
    """So what is compiled for a device that is not here gets that device's backend."""
    monkeypatch.delenv("PATHWAYS_BACKEND", raising=False)
    for platform in ("gpu", "tpu", "cpu"):
        device = AbstractDevice(device_kind="some", num_cores=None, platform=platform)
        with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=device)):
            assert choose_backend(jnp.float32) == choose_backend(jnp.float32, platform)


def test_what_is_dense_in_disguise_is_told_once(monkeypatch):
    told = "the backend 'ragged' applies every expert to every row on gpu; unset \\$PATHWAYS_BACKEND"
    _warn_of_dense.cache_clear()
    monkeypatch.setenv("PATHWAYS_BACKEND", "ragged")
    with pytest.warns(UserWarning, match=told):
        assert choose_backend(jnp.float32, "gpu") == "ragged"
    assert choose_backend(jnp.float32, "gpu") == "ragged"
    assert choose_backend(jnp.float32, "tpu") == "ragged"


def test_kernels_that_fail_on_a_gpu_give_way_with_a_word(monkeypatch):
    monkeypatch.delenv("PATHWAYS_BACKEND", raising=False)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for answer, told in ((lambda: "dw is wrong in float32", "dw is wrong"), (lambda: [][0], "index out of range")):
        triton.works.cache_clear()
        monkeypatch.setattr(triton, "_wrong", answer)
        with pytest.warns(UserWarning, match=f"do not work on this GPU, buckets are used: .*{told}"):
            assert choose_backend(jnp.float32) == "buckets"
        assert choose_backend(jnp.float32) == "buckets"
    triton.works.cache_clear()


@pytest.mark.slow
def test_the_trial_of_the_kernels_finds_what_is_wrong(monkeypatch):
    assert triton._wrong() is None
    right = triton.make_tiles
    monkeypatch.setattr(triton, "make_tiles", lambda *given: (tiles := right(*given))._replace(group=0 * tiles.group))
    assert triton._wrong() == "y is wrong in float32"


@given(sizes=st.lists(st.integers(0, 60), min_size=4, max_size=4))
def test_tiles_hold_each_row_once(sizes):
    """In order, each tile of one group and no longer than asked; the rows of no group too."""
    start = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    tiles = jax.tree.map(np.asarray, jax.jit(triton.make_tiles, static_argnums=(1, 2))(start, 240, 16))
    assert ((tiles.stop - tiles.first) <= 16).all()
    held = [(row, g) for g, a, b in zip(*tiles, strict=True) for row in range(a, b)]
    assert held == list(enumerate(np.repeat(np.arange(5), [*sizes, 240 - start[-1]])))


def test_every_registered_kind_is_tested_here():
    assert set(SLOTS) == set(KINDS)
