"""The C++ products: against float64 at odd sizes, the same bits whatever stands beside a row, and done without."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close

from experts import native
from experts.native import build, grouped_affine
from experts.rows import native_rows
from experts.slots import Placed
from routing.plan import Plan

needs_native = pytest.mark.skipif(not native.available(), reason="no C++ compiler")


def problem(rows: int, groups: int, inputs: int, outputs: int, seed: int = 0):
    """Whole numbers, so that sums are exact in any order; some rows stand in no group, some groups are empty."""
    rng = np.random.default_rng(seed)
    start = np.sort(rng.integers(0, rows + 1, groups + 1)).astype(np.int32)
    shapes = ((rows, inputs), (groups, inputs, outputs), (groups, outputs), (rows, outputs))
    return start, *(rng.integers(-4, 5, shape).astype(np.float32) for shape in shapes)


def oracle(start, x, w, b, dy):
    y, dx = np.zeros((len(x), w.shape[2])), np.zeros(x.shape)
    dw, db = np.zeros(w.shape), np.zeros(b.shape)
    for g in range(len(w)):
        of = slice(start[g], start[g + 1])
        y[of], dx[of] = x[of] @ w[g] + b[g], dy[of] @ w[g].T
        dw[g], db[g] = x[of].T @ dy[of], dy[of].sum(0)
    return y, dx, dw, db


@needs_native
@settings(max_examples=60)
@given(
    rows=st.integers(1, 450),
    groups=st.integers(1, 9),
    inputs=st.integers(1, 300),
    outputs=st.integers(1, 300),
    seed=st.integers(0, 99),
)
def test_any_sizes(rows, groups, inputs, outputs, seed):
    start, x, w, b, dy = problem(rows, groups, inputs, outputs, seed)
    expected = oracle(start, *(leaf.astype(np.float64) for leaf in (x, w, b, dy)))
    y, pull = jax.vjp(lambda x, w, b: grouped_affine(x, w, b, jnp.asarray(start)), x, w, b)
    found = (y, *pull(jnp.asarray(dy)))
    for actual, desired in zip(found, expected, strict=True):
        np.testing.assert_array_equal(actual, desired)


@needs_native
@pytest.mark.parametrize(("rows", "groups", "inputs", "outputs"), [(300, 70, 400, 320), (5, 2, 2100, 2064)])
def test_a_gradient_larger_than_the_caches(rows, groups, inputs, outputs):
    """Such ones are written past the caches; the second case is also longer than the longest panel."""
    start, x, w, b, dy = problem(rows, groups, inputs, outputs)
    y, pull = jax.vjp(lambda x, w, b: grouped_affine(x, w, b, jnp.asarray(start)), x, w, b)
    for actual, desired in zip((y, *pull(jnp.asarray(dy))), oracle(start, x, w, b, dy), strict=True):
        np.testing.assert_array_equal(actual, desired)


@needs_native
def test_without_a_bias():
    start, x, w, b, dy = problem(50, 3, 17, 40)
    y, pull = jax.vjp(lambda x, w: grouped_affine(x, w, None, jnp.asarray(start)), x, w)
    expected = oracle(start, x, w, 0 * b, dy)
    for actual, desired in zip((y, *pull(jnp.asarray(dy))), expected[:3], strict=True):
        np.testing.assert_array_equal(actual, desired)


@needs_native
def test_a_row_has_the_same_bits_wherever_it_stands():
    """So adding a task's rows, or experts, to a batch cannot change what another row gets."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(3, 70, 90)).astype(np.float32)
    x = rng.normal(size=(400, 70)).astype(np.float32)
    run = jax.jit(lambda x, w, start: grouped_affine(x, w, None, start))
    whole = run(x, w, jnp.array([0, 0, 400, 400]))
    for count in (1, 3, 5, 11, 13, 193):
        some = run(x[:count], w[1:2], jnp.array([0, count]))
        np.testing.assert_array_equal(some, whole[:count])
    again = [run(x, w, jnp.array([0, 0, 400, 400])) for _ in range(5)]
    assert all((np.asarray(other) == np.asarray(whole)).all() for other in again)


@needs_native
def test_rows_in_no_group_are_not_read():
    start, x, w, b, dy = problem(40, 2, 9, 5)
    start = np.array([3, 20, 30], np.int32)
    x[:3] = x[30:] = np.nan
    y, pull = jax.vjp(lambda x, w, b: grouped_affine(x, w, b, jnp.asarray(start)), x, w, b)
    for leaf in (y, *pull(jnp.asarray(dy))):
        assert np.isfinite(leaf).all()
    assert (np.asarray(y)[:3] == 0).all()
    assert (np.asarray(y)[30:] == 0).all()


@needs_native
def test_under_vmap():
    start, x, w, b, _ = problem(30, 2, 8, 6)
    stacked = jax.vmap(lambda x: grouped_affine(x, w, b, jnp.asarray(start)))(jnp.stack([x, 2 * x]))
    assert_close(stacked[1], oracle(start, 2 * x, w, b, np.zeros((30, 6)))[0])


def test_float64_is_refused():
    x = np.zeros((2, 3))
    with pytest.raises(ValueError, match="expected float32 or bfloat16 rows, got float64"):
        native_rows({"mlp": Placed({}, 0, 1)}, x, Plan(jnp.zeros((2, 1), jnp.int32), jnp.ones((2, 1))), None)


ASK = """
import jax.numpy as jnp
from experts import native
from experts.compute import choose_backend
print(native.available(), choose_backend(jnp.float32))
"""


@pytest.mark.parametrize("how", ["switched off", "no compiler", "a compiler that fails", "a cache that is a file"])
def test_it_is_done_without_in_silence(how, tmp_path):
    env = {**os.environ, "PATHWAYS_CACHE": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"}
    if how == "switched off":
        env[build.SWITCH] = "0"
    elif how == "no compiler":
        env["PATH"] = str(tmp_path)
    elif how == "a compiler that fails":
        (tmp_path / "g++").write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / "g++").chmod(0o755)
        env["PATH"] = f"{tmp_path}:{env['PATH']}"
    else:
        (tmp_path / "cache").write_text("")
    done = subprocess.run([sys.executable, "-c", ASK], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "buckets"]
    assert done.stderr == ""
    assert not list(tmp_path.glob("cache/native/*"))


@needs_native
def test_it_is_built_once(tmp_path, monkeypatch):
    monkeypatch.setenv("PATHWAYS_CACHE", str(tmp_path))
    library = build._built()
    assert library.exists()
    assert [path.name for path in library.parent.iterdir()] == [library.name]
    monkeypatch.setenv("PATH", "")
    assert build._built() == library
