"""Transports: how rows meet the experts that their plan names, on a mesh.

Axis letters: T rows, D width, K experts per row, P devices that split the rows.

A transport wraps a grouped compute, which it takes as a function of what one device holds: `compute(params, x, plan)`.
It knows neither experts nor routing: `params` and `plan` are pytrees of arrays, every leaf of the plan `[T, ...]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from sharding.rules import AxisRules

Compute = Callable[[Any, jax.Array, Any], jax.Array]
"""`(params, x [T, D], plan) -> y [T, D]`."""


class Transport(Protocol):
    """Makes of a compute on one device one on a mesh, with the same signature and the same numbers."""

    def __call__(self, mesh: Mesh | AbstractMesh, rules: AxisRules, compute: Compute) -> Compute: ...


def local(mesh: Mesh | AbstractMesh, rules: AxisRules, compute: Compute) -> Compute:
    """No exchange: every device holds all experts and applies them to its own rows.

    Rows are split over the mesh axes of the logical axis "rows"; parameters are whole everywhere, and their gradients
    are summed over those axes. The function returned raises ValueError if its rows cannot be split evenly.
    """
    axes = rules.axes("rows")
    devices = math.prod(mesh.shape[axis] for axis in axes)
    by_row = rules.spec("rows")

    def on_device(params: Any, x: jax.Array, plan: Any) -> jax.Array:
        # The transpose of this cast is the sum of the parameters' gradients over the devices.
        own = jax.tree.map(lambda leaf: lax.pcast(leaf, axes, to="varying"), params) if axes else params
        return compute(own, x, plan)

    mapped = jax.shard_map(
        on_device, mesh=mesh, in_specs=(PartitionSpec(), by_row, by_row), out_specs=by_row, check_vma=True
    )

    def apply(params: Any, x: jax.Array, plan: Any) -> jax.Array:
        check_rows(x.shape[0], devices, axes)
        return mapped(params, x, plan)

    return apply


def check_rows(rows: int, devices: int, axes: tuple[str, ...]) -> None:
    """Raises ValueError unless `devices` can share `rows` evenly."""
    if rows % devices:
        below = rows // devices * devices
        near = f"{below} or {below + devices}" if below else f"{devices}"
        raise ValueError(
            f"{rows} rows cannot be split evenly over the {devices} devices of the mesh axes "
            f"{', '.join(axes)}; expected a multiple of {devices}, such as {near}: pad the batch"
        )


TRANSPORTS: dict[str, Transport] = {"local": local}
"""Each by its name."""
