"""The hybrid backend: buckets of a fixed size as one batched product, and blocks for what overflows.

The assignments are sorted once. Each expert gets a bucket of about 1.25 times its fair share, and all buckets are one
batched product; what overflows goes, in the sorted order, through a loop over small blocks that runs only as often as
there are such blocks. Rows move by gathers alone, in the backward pass too.

Where most experts must stay without a row, as in decoding and serving, there are no buckets: each row is a block, and
the loop reads the parameters of the experts that were chosen and of no other.

Axis letters: T rows, K experts per row, D width, E slots, C capacity of a bucket, L overflow blocks, b rows in a block,
P places.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from experts.kinds import Bank, get_kind
from experts.rows import combine_rows, pull_combine, sort_plan, wide
from experts.slots import Placed
from routing.blocks import Layout, block_layout, bucket_layout, take_rows
from routing.plan import Plan

CAPACITY_FACTOR = 1.25
LARGEST_BLOCK = 64


def bucket_capacity(assignments: int, num_slots: int) -> int:
    """C: 1.25 times the fair share of a slot, up to a multiple of 8; 0 where most slots must stay empty, as reading
    the parameters of every expert would then cost more than the work."""
    if 2 * assignments <= num_slots:
        return 0
    return -(-int(CAPACITY_FACTOR * assignments) // (8 * num_slots)) * 8


def overflow_block(capacity: int) -> int:
    """b: up to twice a bucket's size, so that a block is not mostly padding where experts have few rows; 1 without
    buckets, where an expert that has rows mostly has one."""
    return max(1, min(LARGEST_BLOCK, 2 * capacity))


def buckets(banks: Mapping[str, Placed], x: jax.Array, plan: Plan, block_size: int | None) -> jax.Array:
    """Buckets and overflow blocks for each kind, all from one sort, `[T, D]` in the wide type."""
    by_slot, num_slots = sort_plan(banks, plan)
    capacity = bucket_capacity(plan.slot.size, num_slots)
    y = jnp.zeros(x.shape, wide(x.dtype))
    for kind, bank in banks.items():
        if bank.num and x.shape[0]:
            bucket = bucket_layout(by_slot, capacity, bank.start, bank.num)
            size = block_size or overflow_block(capacity)
            over = block_layout(by_slot, size, bank.start, bank.num, skip=capacity)
            part: jax.Array = _grouped(get_kind(kind).apply, bank.params, x, plan.weight, bucket, over)
            y = y + part
    return y


# The custom VJP keeps every movement of rows a gather: the transpose of "gather rows to places" is "gather places to
# rows", which autodiff would write as a scatter-add. It also keeps the overflow free when there is none.


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(
    apply: Callable[[Bank, jax.Array], jax.Array],
    params: Bank,
    x: jax.Array,
    weight: jax.Array,
    bucket: Layout,
    over: Layout,
) -> jax.Array:
    """One kind's share of `[T, D]`, in the wide type."""
    return _grouped_forward(apply, params, x, weight, bucket, over)[0]


def _grouped_forward(apply, params, x, weight, bucket, over):
    out, pull = jax.vjp(apply, params, _to_places(x, bucket, weight.shape[1]))
    flat = out.reshape(-1, x.shape[1])

    def with_overflow():
        rest = _overflow_outputs(apply, params, x, weight.shape[1], over)
        return combine_rows(jnp.concatenate([flat, rest]), _positions(bucket, over), weight)

    y = _when_overflowing(over, with_overflow, lambda: combine_rows(flat, bucket.position, weight))
    return y, (pull, flat, params, x, weight, bucket, over)


def _grouped_backward(apply, residual, dy):
    pull, flat, params, x, weight, bucket, over = residual
    d_out, d_weight = pull_combine(dy, flat, weight, bucket.order)
    num = bucket.block_group.shape[0]
    d_params, d_places = pull(d_out.reshape(num, -1, x.shape[1]))
    d_flat = d_places.reshape(-1, x.shape[1])

    def with_overflow():
        more_params, more_places, more_weight = _overflow_gradients(apply, params, d_params, x, weight, over, dy)
        position = _positions(bucket, over)
        dx = combine_rows(jnp.concatenate([d_flat, more_places]), position, jnp.ones_like(weight))
        return more_params, dx, take_rows(jnp.concatenate([d_weight, more_weight]), position)

    def without():
        dx = combine_rows(d_flat, bucket.position, jnp.ones_like(weight))
        return d_params, dx, take_rows(d_weight, bucket.position)

    d_params, dx, d_weight = _when_overflowing(over, with_overflow, without)
    return d_params, dx.astype(x.dtype), d_weight.reshape(weight.shape).astype(weight.dtype), None, None


_grouped.defvjp(_grouped_forward, _grouped_backward)


def _when_overflowing(over: Layout, yes: Callable[[], Any], no: Callable[[], Any]) -> Any:
    return lax.cond(over.used > 0, yes, no) if over.block_group.shape[0] else no()


def _positions(bucket: Layout, over: Layout) -> jax.Array:
    """The place of each assignment in the buckets followed by the overflow blocks."""
    places = bucket.order.shape[0]
    return jnp.where(bucket.position < places, bucket.position, places + over.position)


def _to_places(x: jax.Array, layout: Layout, k: int) -> jax.Array:
    """Rows `[T, D]` to `[L, b, D]`; empty places hold zeros."""
    return take_rows(x, layout.order // k).reshape(layout.block_group.shape[0], -1, x.shape[1])


def _zeros(shape: tuple[int, ...], dtype: Any, over: Layout) -> jax.Array:
    """Zeros that vary over the same mesh axes as the plan, as the carry of a loop inside shard_map must."""
    return jnp.zeros(shape, dtype) + (over.used * 0).astype(dtype)


def _one_block(params: Bank, x: jax.Array, k: int, over: Layout, block: jax.Array) -> tuple[Bank, jax.Array, Layout]:
    """The expert of one overflow block `[1, ...]`, its rows `[1, b, D]`, and the block as a layout of its own."""
    size = over.order.shape[0] // over.block_group.shape[0]
    order = lax.dynamic_slice_in_dim(over.order, block * size, size)
    mine = Layout(order, over.position, over.block_group[block][None], over.used)
    expert = jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, mine.block_group[0], 1), params)
    return expert, _to_places(x, mine, k), mine


def _overflow_outputs(apply, params: Bank, x: jax.Array, k: int, over: Layout) -> jax.Array:
    """`[L*b, D]`, computed block by block as far as blocks are used."""
    size = over.order.shape[0] // over.block_group.shape[0]

    def step(block, out):
        expert, rows, _ = _one_block(params, x, k, over, block)
        return lax.dynamic_update_slice_in_dim(out, apply(expert, rows)[0], block * size, 0)

    return lax.fori_loop(0, over.used, step, _zeros((over.order.shape[0], x.shape[1]), x.dtype, over))


def _overflow_gradients(apply, params: Bank, d_params: Bank, x: jax.Array, weight: jax.Array, over: Layout, dy):
    """`d_params` with the overflow's share added, and the gradients at its places: of rows and of weights."""
    size = over.order.shape[0] // over.block_group.shape[0]

    def step(block, carry):
        d_params, d_places, d_weight = carry
        expert, rows, mine = _one_block(params, x, weight.shape[1], over, block)
        out, pull = jax.vjp(apply, expert, rows)
        d_out, at = pull_combine(dy, out[0], weight, mine.order)
        d_expert, d_rows = pull(d_out[None])
        d_params = jax.tree.map(lambda leaf, d: leaf.at[mine.block_group].add(d), d_params, d_expert)
        d_places = lax.dynamic_update_slice_in_dim(d_places, d_rows[0], block * size, 0)
        return d_params, d_places, lax.dynamic_update_slice_in_dim(d_weight, at, block * size, 0)

    places = over.order.shape[0]
    start = (d_params, _zeros((places, x.shape[1]), x.dtype, over), _zeros((places,), dy.dtype, over))
    return lax.fori_loop(0, over.used, step, start)
