"""The grouped compute: rows through the experts that a plan chose.

`y[t] = sum_k weight[t, k] * expert(slot[t, k])(x[t])`

Axis letters: T rows, K experts per row, D width, E slots.

Backends stand in `BACKENDS`. All give the same numbers up to rounding; no row is ever dropped.

- `dense` applies every expert to every row: the oracle, good for float64, and costs E / K times too much.
- `native`: products of sorted rows in C++, for CPU where a compiler is there, in float32 and, if the processor has it,
  in bfloat16 (`experts.native`).
- `triton`: products of sorted rows as Pallas kernels, for GPU (`experts.triton`).
- `buckets`: one batched product and a loop over what overflows, in plain XLA (`experts.buckets`).
- `ragged`: `lax.ragged_dot` on sorted rows, for TPU (`experts.rows`).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from experts import native
from experts.buckets import buckets
from experts.kinds import Bank, get_kind
from experts.rows import native_rows, ragged_rows, triton_rows, wide
from experts.slots import Placed
from routing.plan import Plan

__all__ = ["BACKENDS", "Placed", "apply_experts", "choose_backend", "wanted_backend"]

Banks = Mapping[str, Placed | tuple[Bank, int, int]]
Backend = Callable[[Mapping[str, Placed], jax.Array, Plan, int | None], jax.Array]
OVERRIDE = "PATHWAYS_BACKEND"
"""Set in the environment to the name of a backend, to use it in place of the chosen one."""


@jax.named_scope("experts")
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
        backend: a name in `BACKENDS`, or "auto": `choose_backend`.
        block_size: rows in an overflow block of `buckets`; by the rows per expert if None.

    Returns:
        `[T, D]` of x's type; zero for a row that is nowhere.

    Raises:
        ValueError: for an unknown kind or backend, ranges that overlap, or shapes that do not fit.
    """
    placed = {kind: Placed(*bank) for kind, bank in banks.items()}
    _check(placed, x, plan, block_size)
    _check_backend(backend)
    name = choose_backend(x.dtype) if backend == "auto" else backend
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


def _identity(bank: Placed, x: jax.Array, plan: Plan) -> jax.Array:
    mine = bank.owns(plan.slot)
    weight = jnp.where(mine, plan.weight, 0).sum(1).astype(wide(x.dtype))
    return jnp.where(mine.any(1)[:, None], weight[:, None] * x.astype(weight.dtype), 0)


def _dense(banks: Mapping[str, Placed], x: jax.Array, plan: Plan, block_size: int | None) -> jax.Array:
    """Every expert on every row, `[T, D]` in the wide type."""
    del block_size
    y = jnp.zeros(x.shape, wide(x.dtype))
    for kind, bank in banks.items():
        chosen = plan.slot[..., None] == bank.start + jnp.arange(bank.num)
        mask = chosen.any(1)
        rows = jnp.where(mask.any(1)[:, None], x, 0)
        weight = jnp.where(chosen, plan.weight[..., None], 0).sum(1).astype(y.dtype)
        out = get_kind(kind).apply(bank.params, jnp.broadcast_to(rows, (bank.num, *x.shape)))
        y += jnp.einsum("te,etd->td", weight, out.astype(y.dtype), precision=lax.Precision.HIGHEST)
    return y


BACKENDS: dict[str, Backend] = {
    "dense": _dense,
    "native": native_rows,
    "triton": triton_rows,
    "buckets": buckets,
    "ragged": ragged_rows,
}
"""Each maps (banks, x, plan, block_size) to `[T, D]` in the wide type; the banks have leaves (identity is apart)."""

GPU = ("gpu", "cuda", "rocm")


def choose_backend(dtype: Any, platform: str | None = None) -> str:
    """The backend for a compute type on a platform ("cpu", "gpu", "tpu"; that of the mesh in force if None, so that a
    program can be compiled for devices that are not here; jax's default one without a mesh).

    `$PATHWAYS_BACKEND` overrides it. A choice that would apply every expert to every row is told by a warning, once.

    Raises:
        ValueError: the override names no backend, or one that is not there.
    """
    if platform is None:
        device = jax.sharding.get_abstract_mesh().abstract_device
        platform = jax.default_backend() if device is None else device.platform
    wanted = wanted_backend()
    if wanted != "auto":
        if wanted == "dense" or (wanted == "ragged" and platform != "tpu"):
            _warn_of_dense(wanted, platform)
        return wanted
    if platform == "tpu":
        # Before, XLA for TPU computed the weights' gradients of ragged_dot densely.
        return "ragged" if jax.__version_info__ >= (0, 12) else "buckets"
    if platform in GPU:
        return "triton" if dtype != jnp.float64 and _triton_works() else "buckets"
    return "native" if native.available(dtype) else "buckets"


def wanted_backend() -> str:
    """What `$PATHWAYS_BACKEND` asks for; "auto" where it is not set.

    Raises:
        ValueError: there is no such backend, or it is not there on this machine.
    """
    wanted = os.environ.get(OVERRIDE) or "auto"
    _check_backend(wanted, f" in ${OVERRIDE}")
    return wanted


def _check_backend(name: str, where: str = "") -> None:
    if name not in ("auto", *BACKENDS):
        names = ", ".join(sorted(BACKENDS))
        raise ValueError(f"unknown backend {name!r}{where}, expected auto or one of {names}")
    if name == "native" and not native.available():
        raise ValueError(f"the native backend is not there{where}: expected a C++ compiler, and PATHWAYS_NATIVE not 0")


def _triton_works() -> bool:
    try:
        from experts.triton import works
    except ImportError:
        # The jax at hand has no Triton.
        return False
    return works()


@cache
def _warn_of_dense(backend: str, platform: str) -> None:
    warnings.warn(
        f"the backend {backend!r} applies every expert to every row on {platform}; unset ${OVERRIDE} for a grouped one",
        stacklevel=3,
    )
