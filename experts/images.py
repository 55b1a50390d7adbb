"""The grouped compute for images: examples through the image experts that a plan chose.

`y[n] = sum_k weight[n, k] * expert(slot[n, k])(x[n])`

The choices are sorted once by expert and cut into small blocks, each of one expert. A loop runs over the blocks that
hold something, as many as there are: its cost follows the choices, not the number of experts, and no example is
dropped. A block is one ordinary convolution over the examples in it, which every platform does well.

The backward pass is written by hand: it runs over the same blocks. The spatial step's outputs are kept, so that no
convolution is computed twice, and the movements of examples are gathers in both directions.

Axis letters: N examples, H, W, C height, width and channels, K experts per example, E slots, b examples in a block, L
blocks, P = L b places.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from experts.image_kinds import ImageKind, get_image_kind
from experts.kinds import Bank
from experts.slots import Placed
from routing.blocks import Layout, block_layout, sort_by_group, take_rows
from routing.plan import Plan

LARGEST_BLOCK = 32
Places = tuple[tuple[str, int, int], ...]
"""Kind, first slot and number of slots of each bank, in the order of their slots."""


def apply_image_experts(
    banks: Mapping[str, Placed | tuple[Bank, int, int]],
    x: jax.Array,
    plan: Plan,
    *,
    stride: int = 1,
    block_size: int | None = None,
    dense: bool = False,
) -> jax.Array:
    """Applies to each example the experts of its plan and sums their outputs by its weights.

    Differentiable in the banks' parameters, `x` and `plan.weight`. The sum over K is in float32 at least.

    Args:
        banks: kind -> (parameters, first slot, number of slots), the ranges one after the other from slot 0. A slot
            past the last is "nowhere": it adds nothing.
        x: `[N, H, W, C]`.
        plan: slots and weights `[N, K]`.
        stride: of every expert.
        block_size: examples in a block; by default near half of what an expert gets on average, a power of two.
        dense: every expert on every example, which is the oracle and costs E / K times too much.

    Returns:
        `[N, ceil(H / stride), ceil(W / stride), C]` of x's type.

    Raises:
        ValueError: for an unknown kind, or ranges of slots that leave gaps or overlap.
    """
    placed = sorted(((kind, Placed(*bank)) for kind, bank in banks.items()), key=lambda item: item[1].start)
    end = 0
    for kind, bank in placed:
        get_image_kind(kind)
        if bank.start != end:
            raise ValueError(
                f"expected {kind!r} to begin at slot {end}, where the bank before it ends, got {bank.start}"
            )
        end += bank.num
    params = {kind: bank.params for kind, bank in placed}
    places = tuple((kind, bank.start, bank.num) for kind, bank in placed if bank.num)
    if dense:
        return _dense(places, params, x, plan, stride).astype(x.dtype)
    slot = jnp.where((plan.slot >= 0) & (plan.slot < end), plan.slot, end)
    size = block_size or _block_size(slot.size, end)
    layout = block_layout(sort_by_group(slot.reshape(-1), end), size)
    part: jax.Array = _grouped(places, stride, params, x, plan.weight, layout)
    return part.astype(x.dtype)


def _block_size(choices: int, num_slots: int) -> int:
    """Half of the mean number of choices of a slot, rounded to a power of two from 2 to `LARGEST_BLOCK`."""
    half = max(1, choices // max(2 * num_slots, 1))
    return min(LARGEST_BLOCK, max(2, 1 << (half.bit_length() - 1)))


def _wide(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


def _dense(places: Places, params: Mapping[str, Bank], x: jax.Array, plan: Plan, stride: int) -> jax.Array:
    """Every expert on every example, in the wide type."""
    y = jnp.zeros((), _wide(x.dtype))
    for name, start, num in places:
        for i in range(num):
            out = get_image_kind(name).apply(_expert(params[name], i), x, stride).astype(y.dtype)
            weight = jnp.where(plan.slot == start + i, plan.weight, 0).sum(1).astype(y.dtype)
            y = y + weight[:, None, None, None] * out
    return jnp.broadcast_to(y, _outputs(x, len(x), stride))


def _expert(bank: Bank, index: Any) -> Bank:
    return {name: lax.dynamic_index_in_dim(leaf, index, keepdims=False) for name, leaf in bank.items()}


def _outputs(x: jax.Array, num: int, stride: int) -> tuple[int, ...]:
    """The shape of `num` outputs for inputs like `x`."""
    return num, -(-x.shape[1] // stride), -(-x.shape[2] // stride), x.shape[3]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _grouped(
    places: Places, stride: int, params: Mapping[str, Bank], x: jax.Array, weight: jax.Array, layout: Layout
) -> jax.Array:
    """`[N, H', W', C]` in the wide type."""
    return _forward(places, stride, params, x, weight, layout)[0]


def _forward(places, stride, params, x, weight, layout):
    kept = _zeros(_outputs(x, len(layout.order), stride), x.dtype, layout)
    out = _zeros(kept.shape, x.dtype, layout)
    for name, start, num in places:
        kind, bank = get_image_kind(name), params[name]

        def step(block, carry, kind: ImageKind = kind, bank: Bank = bank, start: int = start):
            kept, out = carry
            at, order = _block(layout, block)
            expert = _expert(bank, layout.block_group[block] - start)
            spatial = kind.spatial(expert, take_rows(x, order // weight.shape[1]), stride)
            done = kind.finish(expert, spatial)
            return _put(kept, spatial, at), _put(out, done, at)

        kept, out = lax.fori_loop(*_range(layout, start, num), step, (kept, out))
    return _combine(out, layout.position, weight), (params, x, weight, layout, kept)


def _backward(places, stride, residual, dy):
    params, x, weight, layout, kept = residual
    k, num_places = weight.shape[1], len(layout.order)
    flat_weight = weight.reshape(-1).astype(dy.dtype)
    d_x = _zeros((num_places, *x.shape[1:]), x.dtype, layout)
    d_weight = _zeros((num_places,), dy.dtype, layout)
    d_params = {}
    for name, start, num in places:
        kind, bank = get_image_kind(name), params[name]

        def step(block, carry, kind: ImageKind = kind, bank: Bank = bank, start: int = start):
            d_bank, d_x, d_weight = carry
            at, order = _block(layout, block)
            index = layout.block_group[block] - start
            expert, rows, d_rows = _expert(bank, index), take_rows(x, order // k), take_rows(dy, order // k)
            saved = lax.dynamic_slice_in_dim(kept, at, len(order))
            done, pull_finish = jax.vjp(kind.finish, expert, saved)
            d_done = take_rows(flat_weight, order)[:, None, None, None] * d_rows
            d_expert, d_spatial = pull_finish(d_done.astype(done.dtype))
            # Only the pull is used: the convolution's own output is dead code, and is not computed again.
            _, pull_spatial = jax.vjp(lambda expert, rows, kind=kind: kind.spatial(expert, rows, stride), expert, rows)
            more, d_here = pull_spatial(d_spatial)
            d_bank = {leaf: d.at[index].add(d_expert[leaf] + more[leaf]) for leaf, d in d_bank.items()}
            d_weight = _put(d_weight, jnp.sum(done.astype(dy.dtype) * d_rows, axis=(1, 2, 3)), at)
            return d_bank, _put(d_x, d_here, at), d_weight

        start_bank = {leaf: _zeros(value.shape, value.dtype, layout) for leaf, value in bank.items()}
        carry = (start_bank, d_x, d_weight)
        d_params[name], d_x, d_weight = lax.fori_loop(*_range(layout, start, num), step, carry)
    absent = {name: jax.tree.map(jnp.zeros_like, bank) for name, bank in params.items() if name not in d_params}
    d_x = _combine(d_x, layout.position, jnp.ones_like(weight)).astype(x.dtype)
    d_weight = take_rows(d_weight, layout.position).reshape(weight.shape).astype(weight.dtype)
    return d_params | absent, d_x, d_weight, None


_grouped.defvjp(_forward, _backward)


def _zeros(shape: tuple[int, ...], dtype: Any, layout: Layout) -> jax.Array:
    """Zeros that vary over the same mesh axes as the plan, as the carry of a loop inside shard_map must."""
    return jnp.zeros(shape, dtype) + (layout.used * 0).astype(dtype)


def _range(layout: Layout, start: int, num: int) -> tuple[jax.Array, jax.Array]:
    """The blocks that belong to the slots `start .. start + num - 1`: first, and one past the last."""
    used = jnp.arange(len(layout.block_group)) < layout.used
    before = jnp.sum(used & (layout.block_group < start), dtype=jnp.int32)
    until = jnp.sum(used & (layout.block_group < start + num), dtype=jnp.int32)
    return before, until


def _block(layout: Layout, block: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first place of a block, and the choice at each of its places."""
    size = len(layout.order) // len(layout.block_group)
    return block * size, lax.dynamic_slice_in_dim(layout.order, block * size, size)


def _put(whole: jax.Array, part: jax.Array, at: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(whole, part.astype(whole.dtype), at, 0)


def _combine(out: jax.Array, position: jax.Array, weight: jax.Array) -> jax.Array:
    """`sum_k weight[n, k] * out[position[n, k]]` in the wide type; a choice without a place adds nothing."""
    num, k = weight.shape
    total = jnp.zeros((num, *out.shape[1:]), _wide(out.dtype))
    position = position.reshape(num, k)
    for i in range(k):
        there = position[:, i] < len(out)
        share = jnp.where(there, weight[:, i], 0).astype(total.dtype)
        total += share[:, None, None, None] * take_rows(out, position[:, i]).astype(total.dtype)
    return total
