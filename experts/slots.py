"""Where banks stand among the slots of a layer."""

from __future__ import annotations

from typing import NamedTuple

import jax

from experts.kinds import Bank


class Placed(NamedTuple):
    """A bank and the slots `start .. start + num - 1` that it owns. `start` and `num` are Python integers."""

    params: Bank
    start: int
    num: int

    def owns(self, slot: jax.Array) -> jax.Array:
        """Whether each slot is one of its own."""
        return (slot >= self.start) & (slot < self.start + self.num)
