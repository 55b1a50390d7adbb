"""Kinds of experts: how a bank of each is made and applied, and what it costs.

Axis letters: E experts in a bank, n experts applied at once, b rows of each, D width, F hidden width, A inputs and Z
outputs of a product.

Experts know nothing of routing: they map rows to rows. A kind is written once, in terms of an affine map with a matrix
for each expert; how the rows of many experts lie in memory is the business of that map, so each backend brings its own.
The type of `x` is the compute type: parameters are cast to it, products accumulate in float32 (or in float64 for
float64 rows).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

Bank = dict[str, jax.Array]
"""The experts of one kind in one layer, stacked: each leaf `[E, ...]`. The identity bank has no leaves."""

Kind = TypeVar("Kind")
Affine = Callable[[jax.Array, jax.Array, jax.Array | None], jax.Array]
"""`(rows, w [n, A, Z], b [n, Z] or None) -> rows` in the accumulator's type: each row by its own expert's matrix."""


def batched(x: jax.Array, w: jax.Array, b: jax.Array | None = None) -> jax.Array:
    """The affine map of rows `[n, b, A]` that stand expert by expert, `[n, b, Z]`."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    y = jnp.einsum("nba,naz->nbz", x, w.astype(x.dtype), preferred_element_type=wide)
    return y if b is None else y + b.astype(wide)[:, None]


@dataclass(frozen=True)
class ExpertKind:
    """A kind of expert.

    Attributes:
        name: its key in `KINDS`.
        init: `(key, num, width, hidden, dtype: Any) -> Bank`.
        apply: `(bank of n experts, x [n, b, D]) -> [n, b, D]`, of x's type; or, given as a third argument an affine
            map for rows that lie otherwise, the same for such rows.
        parameters: `(width, hidden) -> int`, of one expert.
        operations: `(width, hidden) -> int`, floating-point operations of the forward products for one row.
        output_names: the leaves that are zero in a fresh expert; with them zero, `apply` gives exactly zero.
    """

    name: str
    init: Callable[[jax.Array, int, int, int, Any], Bank]
    apply: Callable[..., jax.Array]
    parameters: Callable[[int, int], int]
    operations: Callable[[int, int], int]
    output_names: tuple[str, ...] = ()

    def fresh(self, key: jax.Array, num: int, width: int, hidden: int, dtype: Any = jnp.float32) -> Bank:
        """As `init`, with a zero output projection: adding such experts to a layer changes no prediction.

        Raises:
            ValueError: if the kind has no output projection, so that its experts cannot start silent.
        """
        if not self.output_names:
            raise ValueError(f"expert kind {self.name!r} has no output projection: expected a kind with one for fresh")
        bank = self.init(key, num, width, hidden, dtype)
        return bank | {name: jnp.zeros_like(bank[name]) for name in self.output_names}


KINDS: dict[str, ExpertKind] = {}
"""The registry of kinds; add to it with `register`."""


def register(kind: ExpertKind) -> ExpertKind:
    """Adds a kind.

    Raises:
        ValueError: if the name is taken.
    """
    if kind.name in KINDS:
        raise ValueError(f"expert kind {kind.name!r} is registered already; registered: {', '.join(sorted(KINDS))}")
    KINDS[kind.name] = kind
    return kind


def get_kind(name: str) -> ExpertKind:
    """The kind of this name.

    Raises:
        ValueError: for an unknown name, with the nearest known one.
    """
    return choose(KINDS, name, "expert kind")


def choose(kinds: Mapping[str, Kind], name: str, what: str) -> Kind:
    """The kind of this name in a registry.

    Args:
        what: the registry holds, for the message.

    Raises:
        ValueError: for an unknown name, with the nearest known one.
    """
    if name not in kinds:
        near = difflib.get_close_matches(name, kinds, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown {what} {name!r}, expected one of {', '.join(sorted(kinds))}{hint}")
    return kinds[name]


def _lecun(key: jax.Array, shape: tuple[int, int, int], dtype: Any) -> jax.Array:
    """Normal of variance 1 / fan-in, the fan-in being the middle axis."""
    return (jax.random.normal(key, shape, jnp.float32) / jnp.sqrt(shape[1])).astype(dtype)


def _init_mlp(key: jax.Array, num: int, width: int, hidden: int, dtype: Any) -> Bank:
    key_in, key_out = jax.random.split(key)
    return {
        "w_in": _lecun(key_in, (num, width, hidden), dtype),
        "b_in": jnp.zeros((num, hidden), dtype),
        "w_out": _lecun(key_out, (num, hidden, width), dtype),
        "b_out": jnp.zeros((num, width), dtype),
    }


def _apply_mlp(bank: Bank, x: jax.Array, affine: Affine = batched) -> jax.Array:
    hidden = jax.nn.gelu(affine(x, bank["w_in"], bank["b_in"])).astype(x.dtype)
    return affine(hidden, bank["w_out"], bank["b_out"]).astype(x.dtype)


def _init_swiglu(key: jax.Array, num: int, width: int, hidden: int, dtype: Any) -> Bank:
    key_gate, key_up, key_down = jax.random.split(key, 3)
    return {
        "w_gate": _lecun(key_gate, (num, width, hidden), dtype),
        "w_up": _lecun(key_up, (num, width, hidden), dtype),
        "w_down": _lecun(key_down, (num, hidden, width), dtype),
    }


def _apply_swiglu(bank: Bank, x: jax.Array, affine: Affine = batched) -> jax.Array:
    hidden = jax.nn.silu(affine(x, bank["w_gate"], None)) * affine(x, bank["w_up"], None)
    return affine(hidden.astype(x.dtype), bank["w_down"], None).astype(x.dtype)


MLP = register(
    ExpertKind(
        "mlp",
        _init_mlp,
        _apply_mlp,
        parameters=lambda width, hidden: 2 * width * hidden + hidden + width,
        operations=lambda width, hidden: 4 * width * hidden,
        output_names=("w_out", "b_out"),
    )
)
SWIGLU = register(
    ExpertKind(
        "swiglu",
        _init_swiglu,
        _apply_swiglu,
        parameters=lambda width, hidden: 3 * width * hidden,
        operations=lambda width, hidden: 6 * width * hidden,
        output_names=("w_down",),
    )
)
IDENTITY = register(
    ExpertKind(
        "identity",
        init=lambda key, num, width, hidden, dtype: {},
        apply=lambda bank, x, affine=batched: x,
        parameters=lambda width, hidden: 0,
        operations=lambda width, hidden: 0,
    )
)
"""No parameters and no compute: a way to skip."""
