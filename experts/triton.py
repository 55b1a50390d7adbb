"""Grouped products on GPU as Pallas kernels, lowered by Triton; on CPU interpreted, for tests.

Rows lie in the order of their groups, without padding. A map made beside the kernels cuts them into tiles of one group
each, so a tile costs the same whatever the load is, and a group without rows costs nothing. Parameters are cast to the
compute type tile by tile: no copy of a bank is made. Sums are in float32. The bias is added in the kernel; activations
are left to XLA, which fuses them with the rows' type.

Whether float32 products may use the tensor cores' TF32 follows `jax.default_matmul_precision`, as XLA's own do.

Letters: N rows in the order of their groups, G groups, A inputs and Z outputs of a product, L tiles.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from routing.blocks import max_blocks

COLUMNS, DEPTH = 128, 32
"""Columns of a tile of the result, and how many terms of each sum are loaded at once."""
FEWEST, MOST = 16, 128
"""Rows of a tile: the tensor cores take 16 at least."""


class Tiles(NamedTuple):
    """The rows in tiles of one group each; rows of no group get tiles too, which only write zeros.

    `group [L]` of a tile, G for none; `first [L]` and `stop [L]`: its rows. Tiles that are not needed have no rows.
    """

    group: jax.Array
    first: jax.Array
    stop: jax.Array


def tile_rows(rows: int, groups: int) -> int:
    """Rows of a tile: about those of a group, a power of two."""
    share = max(1, rows // max(groups, 1))
    return min(MOST, max(FEWEST, pl.next_power_of_2(share)))


def stages(dtype: Any) -> int:
    """How many steps are loaded ahead for a compute type: what fits into the shared memory of small GPUs (99 KiB)."""
    return 2 if jnp.dtype(dtype).itemsize == 4 else 3


def make_tiles(start: jax.Array, rows: int, size: int) -> Tiles:
    """Cuts `rows` rows, grouped as `start [G + 1]` says, into tiles of at most `size`."""
    groups = start.shape[0] - 1
    edge = jnp.append(start, rows).astype(jnp.int32)
    end = jnp.cumsum((jnp.diff(edge) + size - 1) // size, dtype=jnp.int32)
    tile = lax.iota(jnp.int32, max_blocks(rows, groups + 1, size))
    group = jnp.searchsorted(end, tile, side="right").astype(jnp.int32)
    of = jnp.minimum(group, groups)
    before = jnp.append(jnp.zeros((1,), jnp.int32), end)[of]
    first = jnp.where(group > groups, rows, edge[of] + (tile - before) * size)
    return Tiles(of, first, jnp.minimum(first + size, edge[of + 1]))


@jax.custom_vjp
def grouped_affine(x: jax.Array, w: jax.Array, b: jax.Array | None, start: jax.Array) -> jax.Array:
    """`y[r] = x[r] w[g] + b[g]` for the rows `start[g] <= r < start[g + 1]`, and zero for rows in no group.

    Gradients of outputs are rounded to the compute type before they are multiplied. Rows in no group are not read.

    Args:
        x: `[N, A]`, float32 or narrower: its type is the compute type.
        w: `[G, A, Z]` and b: `[G, Z]` or None, of any type.
        start: `[G + 1]` int32, not falling, from 0 to at most N.

    Returns:
        `[N, Z]` float32.
    """
    return _forward(x, w, b, start)[0]


def _forward(x, w, b, start):
    return _times_matrices(x, w, b, start, turned=False, out=jnp.float32), (x, w, b, start)


def _backward(residual, dy):
    x, w, b, start = residual
    dy = dy.astype(x.dtype)
    dx = _times_matrices(dy, w, None, start, turned=True, out=x.dtype)
    dw, db = _sums_of_outer(x, dy, start, w.dtype, jnp.float32 if b is None else b.dtype)
    return dx, dw, None if b is None else db, None


grouped_affine.defvjp(_forward, _backward)


def _times_matrices(x: jax.Array, w: jax.Array, b: jax.Array | None, start: jax.Array, *, turned: bool, out: Any):
    """Each row times its group's matrix, or times that matrix turned; `[N, Z]` or `[N, A]`."""
    outputs = w.shape[1 if turned else 2]
    size = tile_rows(x.shape[0], w.shape[0])
    tiles = make_tiles(start, x.shape[0], size)
    kernel = partial(_times_matrices_kernel, turned=turned, biased=b is not None, groups=w.shape[0], size=size)
    grid = (tiles.group.shape[0], pl.cdiv(outputs, COLUMNS))
    (y,) = _call(kernel, grid, [((x.shape[0], outputs), out)], *tiles, x, w, *(() if b is None else (b,)))
    return y


def _times_matrices_kernel(group, first, stop, x, w, *rest, turned: bool, biased: bool, groups: int, size: int):
    *bias, y = rest
    (_, inputs), outputs = x.shape, y.shape[1]
    tile, column = pl.program_id(0), pl.program_id(1) * COLUMNS
    mine = group[tile]
    g = jnp.minimum(mine, groups - 1)
    rows, row_on = _span(first[tile], size, stop[tile])
    columns, column_on = _span(column, COLUMNS, outputs)

    def step(i, total):
        depth, depth_on = _span(i * DEPTH, DEPTH, inputs)
        left = _load(x, (rows[:, None], depth[None]), row_on[:, None] & depth_on[None])
        if turned:
            right = _load(w, (g, columns[:, None], depth[None]), column_on[:, None] & depth_on[None])
        else:
            right = _load(w, (g, depth[:, None], columns[None]), depth_on[:, None] & column_on[None])
        return total + plgpu.dot(left, right.astype(left.dtype), trans_b=turned)

    # No product for rows of no group. A factor, not `where`: jax lowers a choice between two constants to one bit.
    steps = (mine < groups).astype(jnp.int32) * pl.cdiv(inputs, DEPTH)
    total = lax.fori_loop(0, steps, step, jnp.zeros((size, COLUMNS), jnp.float32))
    if biased:
        shared = _load(bias[0], (g, columns), column_on & (mine < groups))
        total += shared.astype(jnp.float32)[None]
    _store(y, (rows[:, None], columns[None]), total, row_on[:, None] & column_on[None])


def _sums_of_outer(x: jax.Array, dy: jax.Array, start: jax.Array, dtype: Any, bias_dtype: Any) -> list[jax.Array]:
    """For each group the sum over its rows of `x[r]^T dy[r]`, `[G, A, Z]`, and of `dy[r]`, `[G, Z]`."""
    groups, inputs, outputs = start.shape[0] - 1, x.shape[1], dy.shape[1]
    grid = (groups, pl.cdiv(inputs, MOST), pl.cdiv(outputs, COLUMNS))
    shapes = [((groups, inputs, outputs), dtype), ((groups, outputs), bias_dtype)]
    return _call(_sums_of_outer_kernel, grid, shapes, start.astype(jnp.int32), x, dy)


def _sums_of_outer_kernel(start, x, dy, dw, db):
    g, line = pl.program_id(0), pl.program_id(1)
    first, stop = start[g], start[g + 1]
    inputs, input_on = _span(line * MOST, MOST, x.shape[1])
    outputs, output_on = _span(pl.program_id(2) * COLUMNS, COLUMNS, dy.shape[1])

    def step(i, totals):
        total, shared = totals
        rows, row_on = _span(first + i * DEPTH, DEPTH, stop)
        left = _load(x, (rows[:, None], inputs[None]), row_on[:, None] & input_on[None])
        right = _load(dy, (rows[:, None], outputs[None]), row_on[:, None] & output_on[None])
        return total + plgpu.dot(left, right, trans_a=True), shared + right.astype(jnp.float32).sum(0)

    zeros = (jnp.zeros((MOST, COLUMNS), jnp.float32), jnp.zeros((COLUMNS,), jnp.float32))
    total, shared = lax.fori_loop(0, pl.cdiv(stop - first, DEPTH), step, zeros)
    _store(dw, (g, inputs[:, None], outputs[None]), total, input_on[:, None] & output_on[None])
    _store(db, (g, outputs), shared, output_on & (line == 0))


def _span(first: Any, size: int, stop: Any) -> tuple[jax.Array, jax.Array]:
    """The indices `first .. first + size - 1`, and which of them come before `stop`."""
    index = first + lax.iota(jnp.int32, size)
    return index, index < stop


def _load(ref: Any, index: tuple[Any, ...], mask: jax.Array) -> jax.Array:
    return plgpu.load(ref.at[index], mask=mask, other=0)


def _store(ref: Any, index: tuple[Any, ...], value: jax.Array, mask: jax.Array) -> None:
    plgpu.store(ref.at[index], value.astype(ref.dtype), mask=mask)


def _varying(leaf: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    missing = tuple(axis for axis in axes if axis not in jax.typeof(leaf).manual_axis_type.varying)
    return lax.pcast(leaf, missing, to="varying") if missing else leaf


def _call(kernel: Callable[..., None], grid: tuple[int, ...], shapes: Sequence[Any], *operands: jax.Array):
    """Runs a kernel over whole arrays: by Triton, or interpreted where the program is for CPU."""
    # Inside shard_map the results differ from device to device as the rows do, which pallas_call does not say.
    varying = tuple(frozenset().union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in operands)))
    if varying:
        operands = tuple(_varying(leaf, varying) for leaf in operands)
    varies = jax.typeof(operands[0]).manual_axis_type
    out = [jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varies) for shape, dtype in shapes]
    if not all(grid):
        return [jnp.zeros(leaf.shape, leaf.dtype) for leaf in out]

    narrowest = min((leaf.dtype for leaf in operands), key=lambda dtype: dtype.itemsize)
    params = plgpu.CompilerParams(num_warps=4, num_stages=stages(narrowest))

    def run(*operands: jax.Array, interpret: bool):
        return pl.pallas_call(kernel, out, grid=grid, interpret=interpret, compiler_params=params)(*operands)

    return lax.platform_dependent(*operands, cpu=partial(run, interpret=True), default=partial(run, interpret=False))


@cache
def works() -> bool:
    """Whether the kernels compile for the GPU at hand and give the right numbers on it: tried once in a process, which
    takes seconds, and a warning says why not. Yes where there is no GPU: the program is meant for another machine."""
    if jax.default_backend() != "gpu":
        return True
    try:
        # In a thread of its own, since the caller may be in the midst of tracing, inside any mesh.
        with ThreadPoolExecutor(1) as thread:
            wrong = thread.submit(_wrong).result()
    except Exception as error:  # whatever goes wrong in a compiler or a driver
        wrong = str(error)
    if wrong:
        warnings.warn(f"the triton kernels do not work on this GPU, buckets are used: {wrong}", stacklevel=4)
    return not wrong


def _wrong() -> str | None:
    """What the kernels get wrong in a small problem of whole numbers, whose sums are exact in every type."""
    rng = np.random.default_rng(0)
    start = np.array([0, 21, 21, 37], np.int32)
    x, w, b, dy = (rng.integers(-4, 5, shape) for shape in ((40, 24), (3, 24, 136), (3, 136), (40, 136)))
    group = [slice(*start[g : g + 2]) for g in range(3)]
    y, dx = np.zeros(dy.shape), np.zeros(x.shape)
    for g, of in enumerate(group):
        y[of], dx[of] = x[of] @ w[g] + b[g], dy[of] @ w[g].T
    dw, db = np.stack([x[of].T @ dy[of] for of in group]), np.stack([dy[of].sum(0) for of in group])
    for dtype in (jnp.float32, jnp.bfloat16):
        rows, *given = jnp.asarray(x, dtype), *(jnp.asarray(leaf, jnp.float32) for leaf in (w, b, dy))
        found, pull = jax.vjp(jax.jit(lambda x, w, b: grouped_affine(x, w, b, jnp.asarray(start))), rows, *given[:2])
        for name, actual, expected in zip(
            ("y", "dx", "dw", "db"), (found, *pull(given[2])), (y, dx, dw, db), strict=True
        ):
            if not np.allclose(np.asarray(actual, np.float32), expected, rtol=2.0**-8, atol=0):
                return f"{name} is wrong in {np.dtype(dtype).name}"
    return None
