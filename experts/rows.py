"""Backends that work on rows in the order of their experts, without padding, and the movement of rows that all share.

`native` (C++ on CPU), `triton` (kernels for GPU) and `ragged` (`lax.ragged_dot`, for TPU) differ in one thing alone:
how they multiply rows `[N, A]`, sorted by group, by the matrix of each row's group.

Axis letters: T rows, K experts per row, N = T*K assignments, D width, A inputs and Z outputs of a product, E slots, G
groups (the experts of a kind), P places.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from experts.kinds import Affine, get_kind
from experts.native import grouped_affine
from experts.slots import Placed
from routing.blocks import Sorted, sort_by_group, spread, take_rows
from routing.plan import Plan

AffineOf = Callable[[jax.Array], Affine]
"""`start [G + 1]`, where each group begins among the sorted rows, to the affine map of those rows."""


def wide(dtype: Any) -> Any:
    """The accumulator's type for a compute type."""
    return jnp.promote_types(dtype, jnp.float32)


def native_rows(banks: Mapping[str, Placed], x: jax.Array, plan: Plan, block_size: int | None) -> jax.Array:
    """By the C++ products of `experts.native`, which round float32 parameters as they read them."""
    del block_size
    if x.dtype == jnp.float64:
        raise ValueError("the native backend sums in float32: expected float32 or bfloat16 rows, got float64")
    return _by_rows(banks, x, plan, lambda start: lambda rows, w, b: grouped_affine(rows, w, b, start))


def triton_rows(banks: Mapping[str, Placed], x: jax.Array, plan: Plan, block_size: int | None) -> jax.Array:
    """By the kernels of `experts.triton`; interpreted, and slow, where the program is for CPU."""
    from experts.triton import grouped_affine as grouped_affine_of_triton

    del block_size
    if x.dtype == jnp.float64:
        raise ValueError("the triton backend sums in float32: expected float32 or bfloat16 rows, got float64")
    return _by_rows(banks, x, plan, lambda start: lambda rows, w, b: grouped_affine_of_triton(rows, w, b, start))


def ragged_rows(banks: Mapping[str, Placed], x: jax.Array, plan: Plan, block_size: int | None) -> jax.Array:
    """By `lax.ragged_dot`: a kernel of XLA's on TPU; elsewhere every group is applied to all rows."""
    del block_size
    return _by_rows(banks, x, plan, _ragged_affine)


def _as(w: jax.Array, rows: jax.Array) -> jax.Array:
    """Parameters in the compute type, as every backend takes them."""
    return w.astype(rows.dtype)


def _ragged_affine(start: jax.Array) -> Affine:
    def affine(rows: jax.Array, w: jax.Array, b: jax.Array | None) -> jax.Array:
        y = lax.ragged_dot(rows, _as(w, rows), jnp.diff(start), preferred_element_type=wide(rows.dtype))
        at = lax.iota(jnp.int32, rows.shape[0])
        if b is not None:
            group = jnp.searchsorted(start, at, side="right") - 1
            y = y + take_rows(b.astype(y.dtype), group)
        # What ragged_dot writes past the last group is not specified.
        return jnp.where((at < start[-1])[:, None], y, 0)

    return affine


def _by_rows(banks: Mapping[str, Placed], x: jax.Array, plan: Plan, affine_of: AffineOf) -> jax.Array:
    """`[T, D]` in the wide type: each kind's rows sorted by expert, all experts at once."""
    by_slot, _ = sort_plan(banks, plan)
    y = jnp.zeros(x.shape, wide(x.dtype))
    for kind, bank in banks.items():
        if bank.num and x.shape[0]:
            mine = _only(by_slot, bank)
            rows = spread(x, mine.order // plan.slot.shape[1], mine.position.reshape(plan.slot.shape))
            out = get_kind(kind).apply(bank.params, rows, affine_of(mine.start))
            y = y + combine(out, mine.order, mine.position, plan.weight)
    return y


class Mine(NamedTuple):
    """A kind's assignments in the order of its experts, from place 0 on.

    `start [G + 1]` where each expert's begin; `order [N]` the assignment at each place, N where there is none;
    `position [N]` the place of each assignment, N if it is another kind's.
    """

    start: jax.Array
    order: jax.Array
    position: jax.Array


def _only(by_slot: Sorted, bank: Placed) -> Mine:
    n = by_slot.order.shape[0]
    start = by_slot.start[bank.start : bank.start + bank.num + 1]
    at = start[0] + lax.iota(jnp.int32, n)
    order = jnp.where(at < start[-1], by_slot.order.at[at].get(mode="clip"), n)
    local = jnp.clip(by_slot.group - bank.start, 0, bank.num - 1)
    position = start[local] + by_slot.rank - start[0]
    return Mine(start - start[0], order, jnp.where(bank.owns(by_slot.group), position, n))


def sort_plan(banks: Mapping[str, Placed], plan: Plan) -> tuple[Sorted, int]:
    """The plan's assignments by slot, those whose slot is in no bank last; and the number of slots."""
    num_slots = max(bank.start + bank.num for bank in banks.values())
    in_a_bank = jnp.zeros(plan.slot.shape, bool)
    for bank in banks.values():
        in_a_bank |= bank.owns(plan.slot)
    return sort_by_group(jnp.where(in_a_bank, plan.slot, num_slots).reshape(-1), num_slots), num_slots


@jax.custom_vjp
def combine(places: jax.Array, order: jax.Array, position: jax.Array, weight: jax.Array) -> jax.Array:
    """`y[t] = sum_k weight[t, k] * places[position[t, k]]`, whose transpose is made of gathers too.

    Args:
        places: `[P, D]`.
        order: `[P]` int32, the assignment at each place, N for none.
        position: `[N]` int32, the place of each assignment, P for none: the inverse of `order`.
        weight: `[T, K]`.

    Returns:
        `[T, D]` in the wide type.
    """
    del order
    return combine_rows(places, position, weight)


def _combine_forward(places, order, position, weight):
    return combine_rows(places, position, weight), (places, order, position, weight)


def _combine_backward(residual, dy):
    places, order, position, weight = residual
    d_places, d_weight = pull_combine(dy, places, weight, order)
    return d_places, None, None, take_rows(d_weight, position).reshape(weight.shape).astype(weight.dtype)


combine.defvjp(_combine_forward, _combine_backward)


def combine_rows(places: jax.Array, position: jax.Array, weight: jax.Array) -> jax.Array:
    """`combine` without a rule for its gradient."""
    dtype = wide(places.dtype)
    index = position.reshape(weight.shape)
    terms = [
        take_rows(places, index[:, k]).astype(dtype) * weight[:, k, None].astype(dtype) for k in range(weight.shape[1])
    ]
    return sum(terms[1:], terms[0])


def pull_combine(dy: jax.Array, out: jax.Array, weight: jax.Array, order: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gradients of `combine` at the places that hold `order`: of the outputs `[P, D]` and of the weights `[P]`."""
    dy = take_rows(dy, order // weight.shape[1])
    at = take_rows(weight.reshape(-1), order).astype(dy.dtype)
    return (at[:, None] * dy).astype(out.dtype), (dy * out.astype(dy.dtype)).sum(1)
