"""The C++ products: against float64 at odd sizes, the same bits whatever stands beside a row, and done without."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

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
TYPES = [name for name in ("float32", "bfloat16") if native.available(name)]


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


def check(start, x, w, b, dy, dtype: str = "float32"):
    """All four results are exact: whole numbers, which only the gradient of bfloat16 rows rounds, to their type."""
    expected = list(oracle(start, *(leaf.astype(np.float64) for leaf in (x, w, b, dy))))
    expected[1] = jnp.asarray(expected[1], dtype)
    y, pull = jax.vjp(lambda x, w, b: grouped_affine(x, w, b, jnp.asarray(start)), jnp.asarray(x, dtype), w, b)
    for actual, desired in zip((y, *pull(jnp.asarray(dy))), expected, strict=True):
        np.testing.assert_array_equal(actual, desired)


@needs_native
@settings(max_examples=100)
@given(
    dtype=st.sampled_from(TYPES),
    rows=st.integers(1, 450),
    groups=st.integers(1, 9),
    inputs=st.integers(0, 300),
    outputs=st.integers(0, 300),
    seed=st.integers(0, 99),
)
def test_any_sizes(dtype, rows, groups, inputs, outputs, seed):
    check(*problem(rows, groups, inputs, outputs, seed), dtype)


@needs_native
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("rows", "groups", "inputs", "outputs"), [(300, 70, 400, 320), (5, 2, 2100, 2064)])
def test_a_gradient_larger_than_the_caches(rows, groups, inputs, outputs, dtype):
    """Such ones are written past the caches; the second case is also longer than the longest panel."""
    check(*problem(rows, groups, inputs, outputs), dtype)


@pytest.mark.skipif("bfloat16" not in TYPES, reason="the processor multiplies no bfloat16")
def test_bfloat16_is_that_of_rounded_operands():
    rng = np.random.default_rng(3)
    start, _, _, _, _ = problem(90, 4, 1, 1)
    x, w, dy = (rng.normal(size=shape) for shape in ((90, 70), (4, 70, 33), (90, 33)))
    rounded = [np.asarray(jnp.asarray(leaf, "bfloat16"), np.float64) for leaf in (x, w, dy)]
    y, pull = jax.vjp(
        lambda x, w: grouped_affine(x, w, None, jnp.asarray(start)), jnp.asarray(x, "bfloat16"), jnp.asarray(w)
    )
    dx, dw = pull(jnp.asarray(dy, jnp.float32))
    assert (dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.float32)
    expected = oracle(start, rounded[0], rounded[1], np.zeros((4, 33)), rounded[2])
    assert_close(y, expected[0])
    assert_close(dx, expected[1], "bfloat16")
    assert_close(dw, expected[2])


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


def ask(cache, code=ASK, **changes) -> list[str]:
    """What a process of its own prints, which must say nothing of compilers."""
    env = {**os.environ, "PATHWAYS_CACHE": str(cache), "JAX_PLATFORMS": "cpu", "PATHWAYS_BACKEND": "auto", **changes}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert not any(word in done.stderr for word in ("g++", "clang", "compiler", "grouped")), done.stderr
    return done.stdout.split()


def only_compiler(folder, script):
    """A PATH on which every compiler is this script."""
    folder.mkdir()
    for name in build.COMPILERS:
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_it_is_done_without_in_silence(tmp_path):
    (tmp_path / "file").write_text("")
    assert ask(tmp_path / "off", **{build.SWITCH: "0"}) == ["False", "buckets"]
    assert ask(tmp_path / "none", PATH=str(tmp_path)) == ["False", "buckets"]
    assert ask(tmp_path / "file") == ["False", "buckets"]
    assert not (tmp_path / "off").exists()


def test_a_compiler_that_fails_is_asked_once(tmp_path):
    path = only_compiler(tmp_path / "bin", f"echo asked >> {tmp_path}/asked; exit 1")
    for _ in range(2):
        assert ask(tmp_path / "cache", PATH=path) == ["False", "buckets"]
    assert (tmp_path / "asked").read_text().split() == ["asked"] * len(build.COMPILERS)
    assert [file.suffix for file in (tmp_path / "cache" / "native").iterdir()] == [".failed"]


@needs_native
def test_it_is_built_once_and_again_when_damaged(tmp_path, monkeypatch):
    monkeypatch.setenv("PATHWAYS_CACHE", str(tmp_path))
    library = build.built()
    assert [path.name for path in library.parent.iterdir()] == [library.name]
    before = library.stat().st_mtime_ns
    assert build.built().stat().st_mtime_ns == before
    library.write_bytes(b"damaged")
    assert ask(tmp_path) == ["True", "native"]
    assert library.stat().st_size > 10_000


@needs_native
def test_what_others_could_have_written_is_not_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("PATHWAYS_CACHE", str(tmp_path))
    build.built().parent.chmod(0o777)
    with pytest.raises(PermissionError, match="can be written by others"):
        build.built()


NARROW = """
import jax, numpy as np
from experts.native import build, grouped_affine
build.FLAGS = tuple("-march=x86-64-v3" if flag == "-march=native" else flag for flag in build.FLAGS)
assert build.available()
import sys; sys.path.insert(0, sys.argv[1] if len(sys.argv) > 1 else "tests")
import test_experts_native as tests
for sizes in ((300, 5, 70, 90), (37, 4, 300, 33), (9, 3, 2100, 17)):
    start, x, w, b, dy = tests.problem(*sizes)
    y, pull = jax.vjp(lambda x, w, b: grouped_affine(x, w, b, np.asarray(start)), x, w, b)
    for actual, desired in zip((y, *pull(dy)), tests.oracle(start, x, w, b, dy), strict=True):
        np.testing.assert_array_equal(actual, desired)
print("same")
"""


@needs_native
@pytest.mark.skipif(platform.machine() != "x86_64", reason="for processors with and without AVX-512")
def test_narrower_vectors(tmp_path):
    here = str(Path(__file__).parent)
    assert ask(tmp_path, NARROW.replace('"tests")', f"{here!r})")) == ["same"]
