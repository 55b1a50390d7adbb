"""Grouped products on CPU in C++, called by XLA: built when a compiler is there, and done without when none is.

The source stands beside this file. It is compiled on its first use for the machine at hand, which takes a few seconds,
and kept in the user's cache folder. Without g++ or clang++, on a system other than Linux and macOS, or with
`PATHWAYS_NATIVE=0`, nothing is built and `available()` says no.

Letters: N rows in the order of their groups, G groups, A inputs and Z outputs of a product.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from experts.native.build import available, user_cache

__all__ = ["available", "grouped_affine", "user_cache"]


@jax.custom_vjp
def grouped_affine(x: jax.Array, w: jax.Array, b: jax.Array | None, start: jax.Array) -> jax.Array:
    """`y[r] = x[r] w[g] + b[g]` for the rows `start[g] <= r < start[g + 1]`, and zero for rows in no group.

    Sums are in float32. Rows in no group are not read. Products of bfloat16 rows, forward and backward, are of weights
    and gradients rounded to it where the processor multiplies it (`available(x.dtype)`), and widened to float32
    elsewhere. Needs `available()`.

    Args:
        x: `[N, A]`, float32 or bfloat16.
        w: `[G, A, Z]` and b: `[G, Z]` or None; float32 is used as it stands, without a rounded copy of it.
        start: `[G + 1]` int32, not falling, within `0..N`.

    Returns:
        `[N, Z]` float32.
    """
    return _forward(x, w, b, start)[0]


def _forward(x, w, b, start):
    shape = (x.shape[0], w.shape[2])
    y = _call("forward", (shape,), _rows(x), _float(w), _float(_or_none(b, w)), start)[0]
    return y, (x, w, b, start)


def _backward(residual, dy):
    x, w, b, start = residual
    dy = _rows(dy.astype(x.dtype))
    dx = _call("inputs", (x.shape,), dy, _float(w), start)[0]
    bias = _or_none(b, w).shape
    dw, db = _call("weights", (w.shape, bias), _rows(x), dy, start)
    return dx.astype(x.dtype), dw.astype(w.dtype), None if b is None else db.astype(b.dtype), None


grouped_affine.defvjp(_forward, _backward)


def _or_none(b: jax.Array | None, w: jax.Array) -> jax.Array:
    """The bias, or the empty one that stands for none."""
    return jnp.zeros((w.shape[0], 0), jnp.float32) if b is None else b


def _rows(x: jax.Array) -> jax.Array:
    """In a type that the products take."""
    return x if available(x.dtype) else _float(x)


def _float(leaf: jax.Array) -> jax.Array:
    return leaf.astype(jnp.float32)


def _call(name: str, shapes: tuple[tuple[int, ...], ...], *operands: jax.Array) -> list[jax.Array]:
    outputs = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    found = jax.ffi.ffi_call(f"pathways_grouped_{name}", outputs, vmap_method="sequential")(*operands)
    # Inside shard_map the results differ from device to device as the rows do, which ffi_call does not say.
    varying = tuple(frozenset().union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in operands)))
    return [lax.pcast(leaf, varying, to="varying") if varying else leaf for leaf in found]
