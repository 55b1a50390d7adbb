"""The grouped compute: rows through the experts that a plan chose.

`y[t] = sum_k weight[t, k] * expert(slot[t, k])(x[t])`

Axis letters: T rows, K experts per row, N = T*K assignments, D width, E slots, C capacity of a bucket, L overflow
blocks, b rows in a block, P places.

Backends stand in `BACKENDS`. All give the same numbers; no row is ever dropped.

- `dense` applies every expert to every row: the oracle, good for float64, and costs E / K times too much.
- `sorted` sorts the assignments once, gives each expert a bucket of about 1.25 times its fair share and applies all
  buckets as one batched product; what overflows goes, in the sorted order, through a loop over small blocks that runs
  only as often as there are such blocks. Rows move by gathers alone, in the backward pass too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from experts.kinds import Bank, get_kind
from routing.blocks import Layout, Sorted, block_layout, bucket_layout, sort_by_group, take_rows
from routing.plan import Plan

CAPACITY_FACTOR = 1.25
BLOCK_SIZE = 64


class Placed(NamedTuple):
    """A bank and the slots `start .. start + num - 1` that it owns. `start` and `num` are Python integers."""

    params: Bank
    start: int
    num: int


Banks = Mapping[str, Placed | tuple[Bank, int, int]]
Backend = Callable[[dict[str, Placed], jax.Array, Plan, int | None], jax.Array]


def apply_experts(
    banks: Banks, x: jax.Array, plan: Plan, *, backend: str = "auto", block_size: int | None = None
) -> jax.Array:
    """Applies to each row the experts of its plan and sums their outputs by its weights.

    Differentiable in the banks' parameters, `x` and `plan.weight`. The type of `x` is the compute type; the sum over
    K is in float32 at least.

    Args:
        banks: kind -> (parameters, first slot, number of slots), the ranges of slots disjoint. A slot in no range is
            "nowhere": it adds nothing, and what such a row holds (even NaN) touches no other row.
        x: `[T, D]`.
        plan: slots `[T, K]` and weights `[T, K]`.
        backend: a name in `BACKENDS`, or "auto".
        block_size: rows in a block, for backends that have blocks.

    Returns:
        `[T, D]` of x's type; zero for a row that is nowhere.

    Raises:
        ValueError: for an unknown kind or backend, ranges that overlap, or shapes that do not fit.
    """
    placed = {kind: Placed(*bank) for kind, bank in banks.items()}
    _check(placed, x, plan, block_size)
    name = "sorted" if backend == "auto" else backend
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}, expected auto or one of {', '.join(sorted(BACKENDS))}")
    y = _identity(placed.pop("identity"), x, plan) if "identity" in placed else None
    if placed:
        grouped = BACKENDS[name](placed, x, plan, block_size)
        y = grouped if y is None else y + grouped
    return jnp.zeros_like(x) if y is None else y.astype(x.dtype)


def _check(banks: dict[str, Placed], x: jax.Array, plan: Plan, block_size: int | None) -> None:
    if plan.slot.shape != plan.weight.shape or plan.slot.ndim != 2 or plan.slot.shape[0] != x.shape[0]:
        raise ValueError(
            f"expected slots and weights [T, K] for x [T, D] = {x.shape}, "
            f"got slots {plan.slot.shape} and weights {plan.weight.shape}"
        )
    if block_size is not None and block_size < 1:
        raise ValueError(f"expected a block_size of at least 1, got {block_size}")
    end, before = 0, "slot 0"
    for kind, bank in sorted(banks.items(), key=lambda item: item[1].start):
        get_kind(kind)
        if bank.start < end or bank.num < 0:
            raise ValueError(f"slots {bank.start}..{bank.start + bank.num - 1} of {kind!r} overlap {before}")
        for leaf, array in bank.params.items():
            if array.shape[0] != bank.num:
                raise ValueError(f"expected {bank.num} experts in leaf {leaf!r} of {kind!r}, got {array.shape[0]}")
        end, before = bank.start + bank.num, f"{kind!r}, which ends at slot {bank.start + bank.num - 1}"


def _wide(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


def _identity(bank: Placed, x: jax.Array, plan: Plan) -> jax.Array:
    mine = (plan.slot >= bank.start) & (plan.slot < bank.start + bank.num)
    weight = jnp.where(mine, plan.weight, 0).sum(1).astype(_wide(x.dtype))
    return jnp.where(mine.any(1)[:, None], weight[:, None] * x.astype(weight.dtype), 0)


def _dense(banks: dict[str, Placed], x: jax.Array, plan: Plan, block_size: int | None) -> jax.Array:
    """Every expert on every row, `[T, D]` in the wide type."""
    del block_size
    y = jnp.zeros(x.shape, _wide(x.dtype))
    for kind, bank in banks.items():
        chosen = plan.slot[..., None] == bank.start + jnp.arange(bank.num)
        mask = chosen.any(1)
        rows = jnp.where(mask.any(1)[:, None], x, 0)
        weight = jnp.where(chosen, plan.weight[..., None], 0).sum(1).astype(y.dtype)
        out = get_kind(kind).apply(bank.params, jnp.broadcast_to(rows, (bank.num, *x.shape)))
        y += jnp.einsum("te,etd->td", weight, out.astype(y.dtype), precision=lax.Precision.HIGHEST)
    return y


def bucket_capacity(assignments: int, num_slots: int) -> int:
    """C: 1.25 times the fair share of a slot, up to a multiple of 8; 0 where most slots must stay empty, as reading
    the parameters of every expert would then cost more than the work."""
    if 2 * assignments <= num_slots:
        return 0
    return -(-int(CAPACITY_FACTOR * assignments) // (8 * num_slots)) * 8


def _sorted(banks: dict[str, Placed], x: jax.Array, plan: Plan, block_size: int | None) -> jax.Array:
    """Buckets and overflow blocks for each kind, all from one sort, `[T, D]` in the wide type."""
    num_slots = max(bank.start + bank.num for bank in banks.values())
    in_a_bank = jnp.zeros(plan.slot.shape, bool)
    for bank in banks.values():
        in_a_bank |= (plan.slot >= bank.start) & (plan.slot < bank.start + bank.num)
    by_slot: Sorted = sort_by_group(jnp.where(in_a_bank, plan.slot, num_slots).reshape(-1), num_slots)
    capacity = bucket_capacity(plan.slot.size, num_slots)
    y = jnp.zeros(x.shape, _wide(x.dtype))
    for kind, bank in banks.items():
        if bank.num and x.shape[0]:
            bucket = bucket_layout(by_slot, capacity, bank.start, bank.num)
            over = block_layout(by_slot, block_size or BLOCK_SIZE, bank.start, bank.num, skip=capacity)
            part: jax.Array = _grouped(get_kind(kind).apply, bank.params, x, plan.weight, bucket, over)
            y = y + part
    return y


BACKENDS: dict[str, Backend] = {"dense": _dense, "sorted": _sorted}
"""Each maps (banks, x, plan, block_size) to `[T, D]` in the wide type; the banks have leaves (identity is apart)."""


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
        return _combine(jnp.concatenate([flat, rest]), _positions(bucket, over), weight)

    y = _when_overflowing(over, with_overflow, lambda: _combine(flat, bucket.position, weight))
    return y, (pull, flat, params, x, weight, bucket, over)


def _grouped_backward(apply, residual, dy):
    pull, flat, params, x, weight, bucket, over = residual
    d_out, d_weight = _pull_combine(dy, flat, weight, bucket)
    num = bucket.block_group.shape[0]
    d_params, d_places = pull(d_out.reshape(num, -1, x.shape[1]))
    d_flat = d_places.reshape(-1, x.shape[1])

    def with_overflow():
        more_params, more_places, more_weight = _overflow_gradients(apply, params, d_params, x, weight, over, dy)
        position = _positions(bucket, over)
        dx = _combine(jnp.concatenate([d_flat, more_places]), position, jnp.ones_like(weight))
        return more_params, dx, take_rows(jnp.concatenate([d_weight, more_weight]), position)

    def without():
        dx = _combine(d_flat, bucket.position, jnp.ones_like(weight))
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


def _combine(places: jax.Array, position: jax.Array, weight: jax.Array) -> jax.Array:
    """`y[t] = sum_k weight[t, k] * places[position[t, k]]`, `[T, D]` in the wide type."""
    wide = _wide(places.dtype)
    index = position.reshape(weight.shape)
    terms = [
        take_rows(places, index[:, k]).astype(wide) * weight[:, k, None].astype(wide) for k in range(weight.shape[1])
    ]
    return sum(terms[1:], terms[0])


def _pull_combine(dy: jax.Array, out: jax.Array, weight: jax.Array, layout: Layout) -> tuple[jax.Array, jax.Array]:
    """Gradients of `_combine` at the places of a layout: of the outputs `[P, D]` and of the weights `[P]`."""
    dy = take_rows(dy, layout.order // weight.shape[1])
    at = take_rows(weight.reshape(-1), layout.order).astype(dy.dtype)
    return (at[:, None] * dy).astype(out.dtype), (dy * out.astype(dy.dtype)).sum(1)


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
        d_out, at = _pull_combine(dy, out[0], weight, mine)
        d_expert, d_rows = pull(d_out[None])
        d_params = jax.tree.map(lambda leaf, d: leaf.at[mine.block_group].add(d), d_params, d_expert)
        d_places = lax.dynamic_update_slice_in_dim(d_places, d_rows[0], block * size, 0)
        return d_params, d_places, lax.dynamic_update_slice_in_dim(d_weight, at, block * size, 0)

    places = over.order.shape[0]
    start = (d_params, _zeros((places, x.shape[1]), x.dtype, over), _zeros((places,), dy.dtype, over))
    return lax.fori_loop(0, over.used, step, start)
