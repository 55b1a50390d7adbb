"""The devices that training runs on: a mesh from the configuration, and batches laid over it.

So far the mesh splits rows (data parallelism): parameters are whole on every device, each device runs its own rows
through all experts, and XLA adds up gradients, balance and counters over the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from pathways.config import Config
from sharding.mesh import MeshConfig, make_mesh
from sharding.rules import AxisRules
from sharding.transport import local
from tasks.errors import UserError

RULES = AxisRules()
PACKED = ("source", "segment", "tag")
"""The arrays of a batch that have the packed rows as an axis; the others are whole on every device."""


def mesh_of(config: Config) -> Mesh:
    """The mesh that the configuration asks for, of the first devices there are.

    Raises:
        UserError: it needs devices that are not there, or the rows of a batch cannot be shared evenly.
    """
    options, devices = config.mesh, jax.devices()
    wanted = len(devices) if options.data == -1 else options.data
    if not 1 <= wanted <= len(devices):
        raise UserError(
            "The mesh asks for devices that are not there.",
            where="mesh.data",
            expected=f"1 to {len(devices)}, the devices of this process, or -1 for all",
            got=str(options.data),
        )
    if config.train.rows % wanted:
        near = config.train.rows // wanted * wanted
        raise UserError(
            "The devices cannot share the rows of a batch evenly.",
            where="train.rows",
            expected=f"a multiple of {wanted}, the number of devices, such as {near or wanted} or {near + wanted}",
            got=str(config.train.rows),
        )
    return make_mesh(MeshConfig(data=wanted), devices[:wanted])


@dataclass(frozen=True)
class Placement:
    """Where a loop puts what it computes with."""

    mesh: Mesh

    def batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Lays a host batch, each array `[A, ...]`, over the mesh."""
        by_row, whole = RULES.sharding(self.mesh, None, "rows"), RULES.sharding(self.mesh)
        place = {name: by_row if name in PACKED else whole for name in batch}
        return {name: jax.device_put(leaf, place[name]) for name, leaf in batch.items()}

    def state(self, state: Any) -> Any:
        """Puts a whole copy on every device."""
        return jax.device_put(state, RULES.sharding(self.mesh))


def over_rows(compute: Callable[..., jax.Array], params: Any, x: jax.Array, plan: Any) -> jax.Array:
    """`compute(params, x, plan)` on each device's own rows of the mesh in force; as it is where there is one device."""
    mesh = jax.sharding.get_abstract_mesh()
    # A small batch of an evaluation may have fewer rows than can be shared.
    if mesh.empty or mesh.size == 1 or x.shape[0] % mesh.size:
        return compute(params, x, plan)
    return local(mesh, RULES, compute)(params, x, plan)
