"""Image experts: each kind by hand or in float64, and the grouped compute against every expert on every example."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerance import assert_close

from experts.image_kinds import GROUPS, IMAGE_KINDS, get_image_kind, group_norm, register_image
from experts.images import apply_image_experts
from routing.plan import Plan

CHANNELS, NUM, K = 8, 6, 2
SIZES = {"conv3x3": 2, "conv5x5": 1, "conv7x7": 1, "conv1x7_7x1": 1, "max_pool": 1, "average_pool": 1, "identity": 1}
SLOTS = sum(SIZES.values())


def banks_of(dtype: type, seed: int = 0) -> dict:
    rng, start, found = np.random.default_rng(seed), 0, {}
    for name, num in SIZES.items():
        bank = get_image_kind(name).init(jax.random.key(0), num, CHANNELS, jnp.float32)
        leaves = {leaf: jnp.asarray(0.3 * rng.normal(size=value.shape), dtype) for leaf, value in bank.items()}
        found[name] = (leaves, start, num)
        start += num
    return found


def convolved(x: np.ndarray, kernel: np.ndarray, stride: int) -> np.ndarray:
    """A convolution written out, `x [H, W, C]`, padded as in SAME: more at the end where the padding is odd."""
    h, w = kernel.shape[:2]
    size = [-(-n // stride) for n in x.shape[:2]]
    more = [max((out - 1) * stride + taps - n, 0) for out, taps, n in zip(size, (h, w), x.shape[:2], strict=True)]
    padded = np.pad(x, [(m // 2, m - m // 2) for m in more] + [(0, 0)])
    out = np.zeros((*size, kernel.shape[3]))
    for i in range(size[0]):
        for j in range(size[1]):
            window = padded[i * stride : i * stride + h, j * stride : j * stride + w]
            out[i, j] = np.tensordot(window, kernel, 3)
    return out


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", ["conv3x3", "conv7x7"])
def test_a_convolution_is_normalised_per_example_and_group_then_cut_at_zero(name: str, stride: int) -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 5, 6, CHANNELS))
    leaves = {k: np.asarray(v, np.float64) for k, v in banks_of(np.float32)[name][0].items()}
    with jax.enable_x64(True):
        one = {leaf: jnp.asarray(value[0]) for leaf, value in leaves.items()}
        got = np.asarray(get_image_kind(name).apply(one, jnp.asarray(x), stride))
    for example in range(2):
        plain = convolved(x[example], leaves["kernel"][0], stride)
        for group in np.split(np.arange(CHANNELS), GROUPS):
            part = plain[..., group]
            part = (part - part.mean()) / np.sqrt(part.var() + 1e-5)
            expected = np.maximum(part * leaves["scale"][0, group] + leaves["bias"][0, group], 0)
            assert_close(got[example][..., group], expected, "float64")


def test_the_cross_is_two_convolutions_with_nothing_between() -> None:
    x = np.random.default_rng(2).normal(size=(1, 7, 9, CHANNELS))
    with jax.enable_x64(True):
        one = {
            leaf: jnp.asarray(np.asarray(v[0], np.float64))
            for leaf, v in banks_of(np.float32)["conv1x7_7x1"][0].items()
        }
        got = get_image_kind("conv1x7_7x1").spatial(one, jnp.asarray(x), 2)
        kernels = np.asarray(one["kernel"]), np.asarray(one["kernel2"])
    # The kernels multiply: [1, 7, C, Z] then [7, 1, Z, Y] is one of [7, 7, C, Y], but for what the padding cuts off.
    both = np.einsum("acz,bzy->bacy", kernels[0][0], kernels[1][:, 0])
    assert_close(got[0], convolved(x[0], both, 2), "float64")


def test_pools_and_the_identity_by_hand() -> None:
    x = jnp.arange(12.0).reshape(1, 3, 4, 1)  # rows 0..3, 4..7, 8..11
    run = lambda name, stride: np.asarray(get_image_kind(name).apply({}, x, stride))[0, :, :, 0]  # noqa: E731
    # SAME of 3 rows with stride 2 begins one above, of 4 columns with stride 2 at the first.
    assert run("max_pool", 2).tolist() == [[6, 7], [10, 11]]
    # Top left, stride 2: rows 0 and 1, columns 0..2: (0 + 1 + 2 + 4 + 5 + 6) / 6 = 3; right of it 2..3: (2+3+6+7) / 4.
    assert run("average_pool", 2).tolist() == [[3, 4.5], [7, 8.5]]
    assert run("identity", 2).tolist() == [[0, 2], [8, 10]]
    assert run("identity", 1).tolist() == x[0, :, :, 0].tolist()


def test_group_norm_sees_no_other_example() -> None:
    x = jax.random.normal(jax.random.key(0), (3, 4, 4, CHANNELS))
    one, zero = jnp.ones((CHANNELS,)), jnp.zeros((CHANNELS,))
    alone = group_norm(x[:1], one, zero)
    assert_close(group_norm(x.at[1:].multiply(100.0), one, zero)[:1], alone)


LOADS = {
    "even": lambda rng: np.stack([rng.permutation(SLOTS)[:K] for _ in range(NUM)]),
    "one task, one choice": lambda rng: np.full((NUM, K), [0, 5]),
    "one expert": lambda rng: np.full((NUM, K), [2, SLOTS]),
    "twice the same": lambda rng: np.full((NUM, K), [1, 1]),
    "nowhere": lambda rng: np.full((NUM, K), SLOTS),
}


@functools.cache
def compiled(stride: int, dtype: str, dense: bool):
    """`(slot, x, weight, toward) -> (output, gradients)`, compiled once for all loads."""
    banks = {name: (bank, start) for name, (bank, start, _) in banks_of(np.dtype(dtype).type).items()}

    def loss(leaves, x, weight, slot, toward):
        placed = {name: (leaves[name], start, SIZES[name]) for name, (_, start) in banks.items()}
        y = apply_image_experts(placed, x, Plan(slot, weight), stride=stride, block_size=2, dense=dense)
        return jnp.sum(y * toward), y

    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    leaves = {name: bank for name, (bank, _) in banks.items()}

    def call(slot, x, weight, toward):
        (_, y), grads = run(leaves, *(jnp.asarray(a, dtype) for a in (x, weight)), slot, jnp.asarray(toward, dtype))
        return jax.tree.map(np.asarray, (y, grads))

    return call


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("stride", [1, 2])
def test_grouped_equals_dense_in_outputs_and_gradients(load: str, stride: int) -> None:
    rng = np.random.default_rng(3)
    slot = LOADS[load](rng).astype(np.int32)
    x, weight = rng.normal(size=(NUM, 5, 6, CHANNELS)), rng.normal(size=(NUM, K))
    given = (slot, x, weight, rng.normal(size=(NUM, -(-5 // stride), -(-6 // stride), CHANNELS)))
    with jax.enable_x64(True):
        oracle = compiled(stride, "float64", True)(*given)
        exact = compiled(stride, "float64", False)(*given)
    jax.tree.map(lambda a, b: assert_close(a, b, "float64", scale=10.0), exact, oracle)
    quick = compiled(stride, "float32", False)(*given)
    jax.tree.map(lambda a, b: assert_close(a, b, "float32", scale=10.0), quick, oracle)


def test_what_a_padding_example_holds_touches_no_other() -> None:
    rng = np.random.default_rng(4)
    x = rng.normal(size=(NUM, 4, 4, CHANNELS)).astype(np.float32)
    slot = LOADS["even"](rng).astype(np.int32)
    slot[2] = SLOTS
    weight = jnp.ones((NUM, K))
    clean = apply_image_experts(banks_of(np.float32), jnp.asarray(x), Plan(jnp.asarray(slot), weight))
    x[2] = np.nan
    dirty = apply_image_experts(banks_of(np.float32), jnp.asarray(x), Plan(jnp.asarray(slot), weight))
    assert np.array_equal(clean, dirty)
    assert not np.asarray(dirty[2]).any()


def test_costs_are_those_of_the_leaves() -> None:
    for name, kind in IMAGE_KINDS.items():
        leaves = kind.init(jax.random.key(0), 3, CHANNELS, jnp.float32)
        assert sum(leaf.size for leaf in leaves.values()) == 3 * kind.parameters(CHANNELS), name
    assert get_image_kind("conv5x5").operations(CHANNELS, 10) == 2 * 25 * 64 * 10


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="did you mean 'conv3x3'"):
        get_image_kind("conv3")
    with pytest.raises(ValueError, match="registered already"):
        register_image(IMAGE_KINDS["identity"])
    gap = {"max_pool": ({}, 0, 1), "identity": ({}, 2, 1)}
    with pytest.raises(ValueError, match="begin at slot 1"):
        apply_image_experts(gap, jnp.zeros((1, 2, 2, 4)), Plan(jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1))))
