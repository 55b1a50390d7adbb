"""The plan: what routing decides.

Axis letters: T rows, K experts per row.
"""

from __future__ import annotations

from typing import NamedTuple

import jax


class Plan(NamedTuple):
    """For each row, K slots in the bank(s) of its layer and K weights.

    `slot == num_slots` means "nowhere": a padding row, or a choice that was dropped; its weight is 0.
    """

    slot: jax.Array  # [T, K] int32
    weight: jax.Array  # [T, K] float32
