"""The mesh: which device stands where. Always a mesh, also of one device, so that the same code runs everywhere.

Axes: data (batch split, parameters whole), fsdp (batch split, parameters split too), expert (banks split), tensor
(single matrices split).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "expert", "tensor")


@dataclass(frozen=True)
class MeshConfig:
    """How many devices each axis has; -1, for one axis at most, means what is left."""

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1


def mesh_shape(config: MeshConfig, num_devices: int) -> tuple[int, int, int, int]:
    """The size of each axis in the order of `AXES`.

    Raises:
        ValueError: if the axes cannot use exactly `num_devices`.
    """
    sizes: dict[str, int] = dict(zip(AXES, astuple(config), strict=True))
    for axis, size in sizes.items():
        if size < 1 and size != -1:
            raise ValueError(f"mesh axis {axis}: expected a size of at least 1, or -1 for what is left, got {size}")
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise ValueError(f"expected -1 for one mesh axis at most, got it for {' and '.join(open_axes)}")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if open_axes and num_devices % fixed == 0:
        sizes[open_axes[0]] = num_devices // fixed
    elif open_axes or fixed != num_devices:
        relation = "a product that divides" if open_axes else "a product of"
        raise ValueError(
            f"the mesh axes {sizes} ask for {fixed} devices, expected {relation} the {num_devices} there are; "
            + _suggestion(sizes, num_devices)
        )
    return sizes["data"], sizes["fsdp"], sizes["expert"], sizes["tensor"]


def _suggestion(sizes: dict[str, int], num_devices: int) -> str:
    """The nearest sizes that would fit, for each axis that could be changed alone."""
    options = []
    fixed = math.prod(size for size in sizes.values() if size != -1)
    exact = -1 not in sizes.values()
    for axis, size in sizes.items():
        others = fixed // size
        if size == -1 or num_devices % others:
            continue
        left = num_devices // others
        fits = [left] if exact else [d for d in range(1, left + 1) if left % d == 0]
        near = sorted(fits, key=lambda d: (abs(d - size), d))[:2]
        if size not in near and (size != 1 or exact):
            options.append(f"{axis}={' or '.join(map(str, sorted(near)))}")
    return f"nearest valid choices: {', '.join(options)}" if options else "valid: data=-1 and 1 for the others"


def make_mesh(config: MeshConfig = MeshConfig(), devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of these devices (all by default), with the axes `AXES`, in the runtime's order of devices if all.

    Raises:
        ValueError: if the axes cannot use exactly the devices there are.
    """
    types = (AxisType.Auto,) * len(AXES)
    if devices is None:
        return jax.make_mesh(mesh_shape(config, len(jax.devices())), AXES, axis_types=types)
    shape = mesh_shape(config, len(devices))
    return Mesh(np.asarray(devices, dtype=object).reshape(shape), AXES, axis_types=types)
