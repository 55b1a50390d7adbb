"""Arithmetic on usage matrices, as pure functions.

Axis letters: N tasks, E experts of one layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

OVERLOADED = 2.0
"""An expert is overloaded when its rows exceed this multiple of the layer's mean."""
EXCLUSIVE = 0.99
"""An expert is exclusive when one task sends at least this share of its rows."""
PRESENT = 0.01
"""A task counts among an expert's tasks when it sends more than this share of the expert's rows."""


@dataclass(frozen=True, eq=False)
class Flags:
    """`[E]` booleans each."""

    dead: np.ndarray
    overloaded: np.ndarray
    exclusive: np.ndarray

    def words(self) -> list[str]:
        """Per expert, the names of its flags, joined by commas."""
        columns = {"dead": self.dead, "overloaded": self.overloaded, "exclusive": self.exclusive}
        return [",".join(name for name, on in columns.items() if on[e]) for e in range(len(self.dead))]


def flag(rows: np.ndarray) -> Flags:
    """The flags of a layer's experts.

    Args:
        rows: `[N, E]` rows that each task sent to each expert.

    Returns:
        dead: no row; overloaded: more than 2 times the mean of all E experts; exclusive: at least 99% of the rows
        from one task. A dead expert is never exclusive.
    """
    load = rows.sum(axis=0)
    top = rows.max(axis=0, initial=0)
    mean = load.mean() if load.size else 0.0
    return Flags(load == 0, load > OVERLOADED * mean, (load > 0) & (top >= EXCLUSIVE * load))


def shares(rows: np.ndarray, axis: int = -1) -> np.ndarray:
    """`rows` divided by its sum along `axis`; zeros where that sum is 0."""
    total = rows.sum(axis=axis, keepdims=True)
    return np.divide(rows, total, out=np.zeros(rows.shape, np.float64), where=total > 0)


def coefficient_of_variation(values: np.ndarray) -> float:
    """Standard deviation over mean, 0 for a perfect balance; its square is the loss of Shazeer et al. 2017, eq. 7.

    0 also where the mean is 0.
    """
    mean = float(values.mean()) if values.size else 0.0
    return float(values.std() / mean) if mean else 0.0


def max_over_mean(values: np.ndarray) -> float:
    """Largest over mean, 1 for a perfect balance; 0 where the mean is 0."""
    mean = float(values.mean()) if values.size else 0.0
    return float(values.max() / mean) if mean else 0.0


def cosine(vectors: np.ndarray) -> np.ndarray:
    """`[N, N]` cosines between the rows of `[N, X]`; a zero vector is similar to itself (1) and to nothing else (0)."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = np.divide(vectors, norms, out=np.zeros(vectors.shape, np.float64), where=norms > 0)
    similarity = np.clip(unit @ unit.T, -1.0, 1.0)
    np.fill_diagonal(similarity, 1.0)
    return similarity
