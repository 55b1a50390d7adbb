"""Axis rules: which mesh axes split each logical axis of an array."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields

from jax.sharding import Mesh, NamedSharding, PartitionSpec

MeshAxes = tuple[str, ...] | str | None


@dataclass(frozen=True)
class AxisRules:
    """Logical axis -> mesh axis, several, or None (not split).

    Attributes:
        rows: T or B, tokens or packed rows.
        examples: N, what stands once per example.
        embed: D. hidden: F. heads: attention heads. vocab: entries of an embedding table.
        experts: E. candidates: M. gates: G. layers: stacked layers of a scan.
    """

    rows: MeshAxes = ("data", "fsdp", "expert")
    examples: MeshAxes = ("data", "fsdp", "expert")
    embed: MeshAxes = "fsdp"
    hidden: MeshAxes = "tensor"
    heads: MeshAxes = "tensor"
    vocab: MeshAxes = "tensor"
    experts: MeshAxes = "expert"
    candidates: MeshAxes = None
    gates: MeshAxes = None
    layers: MeshAxes = None

    def axes(self, logical: str | None) -> tuple[str, ...]:
        """The mesh axes of one logical axis; none for None.

        Raises:
            ValueError: for an unknown name, with the nearest known one.
        """
        if logical is None:
            return ()
        known = [field.name for field in fields(self)]
        if logical not in known:
            near = difflib.get_close_matches(logical, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown logical axis {logical!r}, expected one of {', '.join(known)}{hint}")
        rule = getattr(self, logical)
        return () if rule is None else (rule,) if isinstance(rule, str) else tuple(rule)

    def spec(self, *logical: str | None) -> PartitionSpec:
        """How to split an array with these logical axes; None for an axis that is not split.

        Raises:
            ValueError: for an unknown name, or if two axes of the array would be split over one mesh axis.
        """
        taken: dict[str, str | None] = {}
        for name in logical:
            for axis in self.axes(name):
                if axis in taken:
                    raise ValueError(
                        f"axes {logical}: expected each mesh axis once, but {axis!r} would split both "
                        f"{taken[axis]!r} and {name!r}; give one of them another rule, or None"
                    )
                taken[axis] = name
        entries = [self.axes(name) for name in logical]
        return PartitionSpec(*(None if not axes else axes[0] if len(axes) == 1 else axes for axes in entries))

    def sharding(self, mesh: Mesh, *logical: str | None) -> NamedSharding:
        """`spec` on a mesh."""
        return NamedSharding(mesh, self.spec(*logical))
