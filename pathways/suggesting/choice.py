"""Which of the candidates to name: doubtful ones, or just ones unlike those that are known, and no two alike.

Axis letters: m candidates, k rows that are known, n rows to choose, which is also the number of groups, D width.
"""

from __future__ import annotations

import numpy as np

ROUNDS = 20
"""Of moving the centres of groups, at most."""
AT_ONCE = 1 << 23
"""Distances that are held in memory together."""
MOST_GROUPS = 1000
"""Who asks for more rows gets several of a group: the time grows with the square of the number of groups."""


def standardised(x: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Rows `[m, D]` by the mean and deviation of the rows `like [k, D]`; a column without any is left as it is."""
    mean, std = like.mean(axis=0, dtype=np.float64), like.std(axis=0, dtype=np.float64)
    return (x - mean) / np.where(std > 1e-6, std, 1.0)


def most_doubtful(x: np.ndarray, doubt: np.ndarray, n: int, seed: int) -> np.ndarray:
    """The most doubtful row of each of n groups of rows that are alike; then the second of each, if need be.

    Cluster-margin (Citovsky et al. 2021) with as many groups as rows to choose, and k-means for its clustering.

    Args:
        x: `[m, D]`. doubt: `[m]`. seed: of where the groups begin.

    Returns:
        `[n]` places, the most doubtful first, of equal ones the earlier; all m where there are fewer.
    """
    order = np.argsort(-doubt, kind="stable")
    if n >= len(x):
        return order
    group = groups(x, min(n, MOST_GROUPS), seed)[order]
    together = np.argsort(group, kind="stable")
    size = np.bincount(group)
    rank = np.empty(len(x), np.int64)
    rank[together] = np.arange(len(x)) - np.repeat(np.cumsum(size) - size, size)
    return order[np.sort(np.argsort(rank, kind="stable")[:n])]


def groups(x: np.ndarray, n: int, seed: int) -> np.ndarray:
    """`[m]` the group of each row of `x [m, D]`: k-means (Lloyd 1982) from centres of `unlike`."""
    x = x.astype(np.float64)
    centre = x[unlike(x, n, None, seed)[0]]
    group = _nearest(x, centre)
    for _ in range(ROUNDS):
        size = np.bincount(group, minlength=n)
        total = np.zeros_like(centre)
        np.add.at(total, group, x)
        centre = np.where(size[:, None] > 0, total / np.maximum(size, 1)[:, None], centre)
        before, group = group, _nearest(x, centre)
        if np.array_equal(before, group):
            break
    return group


def unlike(x: np.ndarray, n: int, known: np.ndarray | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows drawn one by one, each with a probability in proportion to its squared distance to the nearest row before
    it: the seeding of k-means++ (Arthur and Vassilvitskii 2007), begun from the rows that are known.

    Args:
        x: `[m, D]`. known: `[k, D]`; None or none: the first row is drawn evenly.

    Returns:
        `[n]` places, all m where there are fewer, and `[n]` each one's distance to the nearest before it, infinite for
        a first one. Where all that are left coincide with rows before them, the earliest come.
    """
    rng = np.random.default_rng(seed)
    x = x.astype(np.float64)
    nearest = np.full(len(x), np.inf)
    for row in () if known is None else known:
        nearest = np.minimum(nearest, _squared(x, row))
    free = np.ones(len(x), bool)
    place = np.zeros(min(n, len(x)), np.int64)
    distance = np.zeros(len(place))
    for i in range(len(place)):
        chance = free * np.where(np.isinf(nearest), 1.0, nearest)
        total = chance.cumsum()
        drawn = rng.random() * total[-1]
        place[i] = np.searchsorted(total, drawn, side="right") if total[-1] > 0 else np.argmax(free)
        distance[i] = np.sqrt(nearest[place[i]])
        free[place[i]] = False
        nearest = np.minimum(nearest, _squared(x, x[place[i]]))
    return place, distance


def _squared(x: np.ndarray, row: np.ndarray) -> np.ndarray:
    """`[m]`: squared distances of `x [m, D]` to one row; exactly 0 for an equal one."""
    return np.sum((x - row) ** 2, axis=1)


def _nearest(x: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """`[m]`: which of `centre [n, D]` is the nearest to each row, the first of equally near ones."""
    size = np.sum(centre**2, axis=1)
    step = max(AT_ONCE // len(centre), 1)
    parts = [np.argmin(size - 2.0 * x[i : i + step] @ centre.T, axis=1) for i in range(0, len(x), step)]
    return np.concatenate(parts)
