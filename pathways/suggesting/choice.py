"""Which of the candidates to name: each doubtful, and unlike those before it.

Axis letters: m candidates, k rows that are known, n rows to choose, D width.
"""

from __future__ import annotations

import numpy as np


def squared_distance(x: np.ndarray, row: np.ndarray) -> np.ndarray:
    """`[m]`: from each row of `x [m, D]` to one row `[D]`."""
    return np.sum((x - row) ** 2, axis=1, dtype=np.float64)


def choose(x: np.ndarray, weight: np.ndarray, n: int, known: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Greedy: next comes the row with the largest weight times squared distance to the nearest row before it.

    With equal weights that is the farthest-first traversal (Gonzalez 1985), by which core-set selection covers a pool
    (Sener and Savarese 2018, algorithm 1).

    Args:
        x: `[m, D]`. weight: `[m]`, not negative.
        n: how many; all m where there are fewer.
        known: `[k, D]` rows that stand before all; without, the first is the one with the largest weight.

    Returns:
        `[n]` places of the rows chosen, and `[n]` each one's distance from the nearest before it (infinite for a first
        one). Of equal ones the earlier comes first.
    """
    nearest = np.full(len(x), np.inf)
    for row in () if known is None else known:
        nearest = np.minimum(nearest, squared_distance(x, row))
    order, distance = np.zeros(min(n, len(x)), np.int64), np.zeros(min(n, len(x)))
    free = np.ones(len(x), bool)
    for i in range(len(order)):
        gain = weight if np.isinf(nearest).all() else weight * nearest
        place = int(np.argmax(np.where(free, gain, -1.0)))
        order[i], distance[i] = place, np.sqrt(nearest[place])
        nearest = np.minimum(nearest, squared_distance(x, x[place]))
        free[place] = False
    return order, distance
